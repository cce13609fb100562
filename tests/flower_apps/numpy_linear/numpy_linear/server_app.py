"""The strategy is chosen by name: one of Flower's, or our own subclass, as third-party packages have them."""

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class CloseFriends(FedAvg):
    """Averages the two replies with the smallest loss, each counted once, and keeps what every client said."""

    def summary(self) -> None:
        super().summary()

    def configure_train(self, server_round, arrays, config, grid) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for place, message in enumerate(messages):  # a configuration of its own for each client
            message.content = RecordDict(
                {"arrays": arrays, "config": ConfigRecord({"server-round": server_round, "place": place})}
            )
        return messages

    def aggregate_train(self, server_round, replies):
        usable = [r for r in replies if r.has_content()]
        best = sorted(usable, key=lambda r: r.content["metrics"]["train_loss"])[:2]
        arrays = [r.content["arrays"].to_numpy_ndarrays()[0] for r in best]
        return ArrayRecord([np.mean(arrays, axis=0)]), MetricRecord({"friends": len(best)})


EXTRA = {"Krum": {"num_malicious_nodes": 1}, "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3}}


def build(name: str, fraction: float):
    kind = CloseFriends if name == "CloseFriends" else getattr(strategies, name)
    extra = dict(EXTRA.get(name, {}))
    if name == "FedProx":
        extra["proximal_mu"] = 0.1
    if name == "QFedAvg":
        extra["client_learning_rate"] = 0.1
    return kind(fraction_train=fraction, **extra)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    asked = [Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]
    rows = [r.content["metrics"]["rows"] for r in grid.send_and_receive(asked)]
    drawn = [Message(RecordDict(), node, "query.draw") for node in grid.get_node_ids()]
    values = [r.content["metrics"]["value"] for r in grid.send_and_receive(drawn)]
    result = build(config["strategy"], config["fraction-train"]).start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(config["features"])]),
        num_rounds=config["num-server-rounds"],
    )
    context.state["arrays"] = result.arrays
    context.state["metrics"] = MetricRecord({"rows": rows, "drawn": values})
    for number, record in result.evaluate_metrics_clientapp.items():
        context.state[f"evaluate-{number}"] = record
    for number, record in result.train_metrics_clientapp.items():
        context.state[f"train-{number}"] = record
