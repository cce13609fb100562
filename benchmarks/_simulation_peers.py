"""One system on one workload, in a process of its own: ``python -m benchmarks._simulation_peers SYSTEM WORKLOAD ROUNDS OUT``.

Writes OUT/result.json (seconds of each round, seconds to the end of the first one) and OUT/first.npz, the averaged weights
after round 1. Every system trains the same clients on the same examples in the same order, on two processes of one thread.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.monotonic()  # of this process's own code; interpreter and torch are loaded for every system alike

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks import _workloads as workloads  # noqa: E402
from fl_core.learning.local_update import batches  # noqa: E402

PROCESSES = 2
Arrays = dict[str, np.ndarray]  # type: ignore[type-arg]


def ordered_data(name: str, clients: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """The examples of each client in the order in which our first round reads them: the peers do not shuffle."""
    x, y = workloads.make_data(name, clients)
    w = workloads.WORKLOADS[name]
    for i in range(clients):
        order = np.concatenate(batches(w.examples, workloads.BATCH, 0, "order", 1, workloads.client_name(i), 0))
        x[i], y[i] = x[i][order], y[i][order]
    return x, y


def ours(name: str, clients: int, rounds: int, out: Path, engine: str = "auto") -> dict[str, Any]:
    """``simulate`` as its users run it: round engine, checkpoints, history."""
    from fl_core.contracts import checkpoint as checkpoints
    from fl_core.contracts.checkpoint import Checkpoint
    from fl_server.history import RoundRecord
    from simulations.simulate import simulate

    config, ends = workloads.configured(name, clients), [time.monotonic()]
    first: list[Arrays] = []
    usual = Checkpoint.save

    def save(self: Checkpoint, *args: Any) -> Any:
        if not first:
            first.append({k: np.array(v) for k, v in self.arrays.items()})
        return usual(self, *args)

    Checkpoint.save = save  # type: ignore[method-assign]

    def on_round(record: RoundRecord) -> None:
        if len(record.clients) != clients:
            raise RuntimeError(f"{len(record.clients)} of {clients} clients: {record.refused or record.failed}")
        ends.append(time.monotonic())

    result = simulate(
        workloads.APPLICATION, config, workloads.generate(config, 0), start=None, num_rounds=rounds, seed=0,
        out=out / "run", on_round=on_round, workers=PROCESSES, engine=engine,
    )  # fmt: skip
    assert checkpoints.load(result.final).manifest.step == rounds
    return {**timed(ends), "engine": result.engine, "first": first[0]}


def loop(name: str, clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """What one writes without a framework: two forked processes, each with a model, an optimiser and its share."""
    x, y = (torch.from_numpy(a) for a in ordered_data(name, clients))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(PROCESSES + 1), context.Queue()

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        model = workloads.make_model(name)
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for _ in range(rounds):
            barrier.wait()
            total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in start.items()}
            for i in range(rank * clients // PROCESSES, (rank + 1) * clients // PROCESSES):
                model.load_state_dict(start)
                optimizer = torch.optim.SGD(model.parameters(), lr=workloads.RATE)
                for a in range(0, y.shape[1], workloads.BATCH):
                    optimizer.zero_grad()
                    functional.cross_entropy(
                        model(x[i, a : a + workloads.BATCH]), y[i, a : a + workloads.BATCH]
                    ).backward()
                    optimizer.step()
                for key, value in model.state_dict().items():
                    total[key] += value
            barrier.wait()
            if _ == 0:
                queue.put({k: v.numpy() for k, v in total.items()})

    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    ends: list[float] = []
    first: list[Arrays] = []
    for number in range(rounds):
        barrier.wait()
        ends += [time.monotonic()] if not ends else []
        barrier.wait()
        ends.append(time.monotonic())
        if number == 0:
            first = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return {**timed(ends), "first": {k: sum(part[k] for part in first) / clients for k in first[0]}}


def pfl_research(name: str, clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """pfl-research: one of the processes that PFL_WORKER_ADDRESSES names; weights by user."""
    torch.set_num_threads(1)
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    x, y = (torch.from_numpy(a) for a in ordered_data(name, clients))
    data = {i: Dataset(raw_data=[x[i], y[i]], user_id=str(i)) for i in range(clients)}
    net: Any = workloads.make_model(name)

    def loss(self: Any, inputs: Any, targets: Any, eval: bool = False) -> Any:
        return functional.cross_entropy(self(inputs), targets)

    @torch.no_grad()
    def metrics(self: Any, inputs: Any, targets: Any, eval: bool = True) -> Any:
        total = functional.cross_entropy(self(inputs), targets, reduction="sum").item()
        return {"loss": Weighted(total, len(inputs))}

    net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
    central = torch.optim.SGD(net.parameters(), 1.0)
    model = PyTorchModel(model=net, local_optimizer_create=torch.optim.SGD, central_optimizer=central)
    sampler = get_user_sampler("minimize_reuse", list(range(clients)))
    federated = FederatedDataset(make_dataset_fn=lambda i: data[i], user_sampler=sampler)
    backend = SimulatedBackend(training_data=federated, val_data=federated, postprocessors=[WeightByUser()])
    ends: list[float] = [time.monotonic()]
    first: dict[str, Arrays] = {}

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate: Any, model: Any, *, central_iteration: int) -> Any:
            ends.append(time.monotonic())
            if central_iteration == 0:
                first["arrays"] = {k: v.detach().numpy().copy() for k, v in net.state_dict().items()}
            return False, Metrics()

    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=10**9, train_cohort_size=clients, val_cohort_size=None
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=workloads.RATE, local_num_epochs=1, local_batch_size=workloads.BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=1000),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    return {**timed(ends), "first": first["arrays"]}


CACHE: dict[str, Any] = {}  # of a Ray actor: data and model stay from client to client


def flower(name: str, clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """Flower's simulation engine on Ray, two actors of one core."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    app, server = ClientApp(), ServerApp()
    ends: list[float] = []
    first: dict[str, Arrays] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from benchmarks import _simulation_peers as peers

        torch.set_num_threads(1)
        if not peers.CACHE:
            peers.CACHE["data"] = [torch.from_numpy(a) for a in peers.ordered_data(name, clients)]
            peers.CACHE["model"] = workloads.make_model(name)
        (x, y), model = peers.CACHE["data"], peers.CACHE["model"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=workloads.RATE)
        i, size = int(context.node_config["partition-id"]), workloads.BATCH
        for a in range(0, y.shape[1], size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[i, a : a + size]), y[i, a : a + size]).backward()
            optimizer.step()
        reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": y.shape[1]})}
        return Message(content=RecordDict(reply), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, *args: Any, **kwargs: Any) -> Any:
            ends.extend([] if ends else [time.monotonic()])
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found = super().aggregate_train(server_round, replies)
            ends.append(time.monotonic())
            if server_round == 1:
                first["arrays"] = {k: v.numpy() for k, v in found[0].to_torch_state_dict().items()}
            return found

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        strategy.start(
            grid=grid, initial_arrays=ArrayRecord(workloads.make_model(name).state_dict()), num_rounds=rounds
        )

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": PROCESSES}}
    run_simulation(server_app=server, client_app=app, num_supernodes=clients, backend_config=resources)
    return {**timed(ends), "first": first["arrays"]}


def timed(ends: list[float]) -> dict[str, Any]:
    """ends[0]: when the work began; then the end of each round."""
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    return {"seconds": seconds, "first_round_s": ends[1] - ends[0], "start_up_s": ends[1] - START}


SYSTEMS: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours,
    "loop": loop,
    "pfl": pfl_research,
    "flower": flower,
}


def main() -> int:
    system, name, clients, rounds, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
    kind, _, engine = system.partition("/")
    options = {"engine": engine} if engine else {}
    result = SYSTEMS[kind](name, clients, rounds, out, **options)
    if int(os.environ.get("PFL_WORKER_RANK", "0")) == 0:
        np.savez(out / "first.npz", **result.pop("first"))
        (out / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
