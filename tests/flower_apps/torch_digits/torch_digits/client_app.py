"""The head is personal: it stays in Context.state."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from torch_digits.task import Net, load_data, test
from torch_digits.task import train as train_fn

app = ClientApp()


def network(message: Message, context: Context) -> Net:
    net = Net(context.run_config["train.hidden"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if "head" in context.state:
        net.head.load_state_dict(context.state["head"].to_torch_state_dict())
    return net


def loader(context: Context):
    return load_data(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def train(message: Message, context: Context) -> Message:
    net, data = network(message, context), loader(context)
    loss = train_fn(net, data, context.run_config["train.epochs"], message.content["config"]["lr"])
    context.state["head"] = ArrayRecord(net.head.state_dict())
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    data = loader(context)
    loss, accuracy = test(network(message, context), data)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
