"""Clients with data of their own, a counter in Context.state, a mod, and ways to fail."""

import os
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def stamp(message: Message, context: Context, call_next) -> Message:
    reply = call_next(message, context)
    reply.content.metric_records["metrics"]["went-through-mod"] = 1
    return reply


app = ClientApp(mods=[stamp])


def data(context: Context):
    partition = context.node_config["partition-id"]
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(20 + 4 * partition, context.run_config["features"]))
    return x, x @ np.arange(1.0, 1 + x.shape[1]) + partition


def misbehave(context: Context) -> None:
    who, _, how = context.run_config["fail"].partition(":")
    if not who or int(who) != context.node_config["partition-id"]:
        return
    if how == "raise":
        raise ValueError("the sensor is broken")
    if how == "exit":
        os._exit(7)
    if how.startswith("once "):
        marker = how.removeprefix("once ")
        if not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(7)
    if how == "config":
        context.run_config["lr"] = 99.0


@app.train()
def train(message: Message, context: Context) -> Message:
    x, y = data(context)
    misbehave(context)
    weights = message.content["arrays"].to_numpy_ndarrays()[0]
    mu = message.content["config"].get("proximal-mu", 0.0)
    gradient = x.T @ (x @ weights - y) / len(x)
    trained = weights - context.run_config["lr"] * (gradient + mu * weights)
    if context.run_config["exact"]:  # sums of these are exact, in any order
        trained = weights + (1 + context.node_config["partition-id"]) / 4
    rounds = context.state.config_records.get("own", {"rounds": 0})["rounds"] + 1
    context.state["own"] = ConfigRecord({"rounds": rounds})
    message.content["arrays"].clear()  # what a client does to its message is nobody else's business
    metrics = MetricRecord(
        {
            "num-examples": 1 if context.run_config["exact"] else len(x),
            "rounds": rounds,
            "train_loss": float(np.mean((x @ weights - y) ** 2)),
        }
    )
    return Message(RecordDict({"arrays": ArrayRecord([trained]), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    x, y = data(context)
    loss = float(np.mean((x @ message.content["arrays"].to_numpy_ndarrays()[0] - y) ** 2))
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": len(x), "loss": loss})}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    x, _ = data(context)
    return Message(RecordDict({"metrics": MetricRecord({"rows": len(x), "at": time.time()})}), reply_to=message)


@app.query("draw")
def draw(message: Message, context: Context) -> Message:
    """A process-wide generator, as many apps use it."""
    return Message(RecordDict({"metrics": MetricRecord({"value": float(np.random.rand())})}), reply_to=message)
