"""FedAvg with a server-side evaluation, and a lifespan around it."""

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from torch_digits.task import Net, load_data, test

app = ServerApp()


@app.lifespan()
def lifespan(context: Context):
    context.state["steps"] = MetricRecord({"opened": 1})
    yield
    context.state["steps"] = MetricRecord({"opened": 1, "closed": 1})


@app.main()
def main(grid: Grid, context: Context) -> None:
    hidden = context.run_config["train.hidden"]

    def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net = Net(hidden)
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(zip(("loss", "accuracy"), test(net, load_data(99, 100)), strict=True)))

    result = FedAvg(fraction_train=0.5).start(
        grid=grid,
        initial_arrays=ArrayRecord(Net(hidden).state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["train.lr"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=central,
    )
    context.state["arrays"] = result.arrays
