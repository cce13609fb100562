"""One system on one workload, in a process of its own: ``python -m benchmarks._simulation_peers SYSTEM WORKLOAD ROUNDS OUT``.

Writes OUT/result.json (seconds of each round, seconds to the end of the first one) and OUT/first.npz, the averaged weights
after round 1. Every system trains the same clients on the same examples in the same order, on two processes of one thread.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

START = time.monotonic()  # of this process's own code; interpreter and torch are loaded for every system alike

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks import _workloads as workloads  # noqa: E402
from benchmarks._applications import CLIENTS, PlainClients, problem  # noqa: E402
from fl_core.learning.local_update import batches  # noqa: E402

PROCESSES = 2
Arrays = dict[str, np.ndarray]  # type: ignore[type-arg]
Train = Callable[[int, Mapping[str, torch.Tensor], int, int], int]


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

    found, ends = problem(name, clients), Ends()
    ends.mark()
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
        ends.mark()

    result = simulate(
        found.application, found.config, found.raw, start=None, num_rounds=rounds, seed=0,
        out=out / "run", on_round=on_round, workers=PROCESSES, engine=engine,
    )  # fmt: skip
    assert checkpoints.load(result.final).manifest.step == rounds
    return {**timed(ends), "engine": result.engine, "first": first[0]}


def loop(name: str, clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """What one writes without a framework: two forked processes, each with a model, an optimiser and its share."""
    if name in CLIENTS:
        apart = PlainClients(problem(name, clients))
        return shared_out(lambda: (apart.model, apart.train), clients, rounds)
    x, y = (torch.from_numpy(a) for a in ordered_data(name, clients))

    def begin() -> tuple[nn.Module, Train]:
        model = workloads.make_model(name)

        def train(i: int, start: Mapping[str, torch.Tensor], round: int, num_rounds: int) -> int:
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=workloads.RATE)
            for a in range(0, y.shape[1], workloads.BATCH):
                optimizer.zero_grad()
                found = model(x[i, a : a + workloads.BATCH])
                functional.cross_entropy(found, y[i, a : a + workloads.BATCH]).backward()
                optimizer.step()
            return y.shape[1]

        return model, train

    return shared_out(begin, clients, rounds)


def shared_out(begin: Callable[[], tuple[nn.Module, Train]], clients: int, rounds: int) -> dict[str, Any]:
    """The clients' weighted sums, by two forked processes; every round starts from the same weights."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(PROCESSES + 1), context.Queue()

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        model, train = begin()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for number in range(1, rounds + 1):
            barrier.wait()
            total, weight = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in start.items()}, 0
            for i in range(rank * clients // PROCESSES, (rank + 1) * clients // PROCESSES):
                count = train(i, start, number, rounds)
                weight += count
                for key, value in model.state_dict().items():
                    total[key].add_(value, alpha=count)
            barrier.wait()
            if number == 1:
                queue.put(({k: v.numpy() for k, v in total.items()}, weight))

    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    ends = Ends()
    first: list[tuple[Arrays, int]] = []
    for number in range(rounds):
        barrier.wait()
        if not ends:
            ends.mark()
        barrier.wait()
        ends.mark()
        if number == 0:
            first = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    weight = sum(count for _, count in first)
    return {**timed(ends), "first": {k: sum(part[k] for part, _ in first) / weight for k in first[0][0]}}


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
    ends = Ends()
    ends.mark()
    first: dict[str, Arrays] = {}

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate: Any, model: Any, *, central_iteration: int) -> Any:
            ends.mark()
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
    found = timed(ends)
    return {**found, "cpu_s": [PROCESSES * t for t in found["cpu_s"]], "first": first["arrays"]}  # the others' alike


def initial_model(name: str, clients: int) -> nn.Module:
    if name not in CLIENTS:
        return workloads.make_model(name)
    found = problem(name, clients)
    model: nn.Module = found.application.build_model(found.config)
    return model


CACHE: dict[str, Any] = {}  # of a Ray actor: data and model stay from client to client


def flower(name: str, clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """Flower's simulation engine on Ray, two actors of one core."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    app, server = ClientApp(), ServerApp()
    ends = Ends()
    first: dict[str, Arrays] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from benchmarks import _simulation_peers as peers

        torch.set_num_threads(1)
        if name in CLIENTS:
            return peers.flower_application(name, clients, rounds, message, context)
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
            if not ends:
                ends.mark()
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found = super().aggregate_train(server_round, replies)
            ends.mark()
            if server_round == 1:
                first["arrays"] = {k: v.numpy() for k, v in found[0].to_torch_state_dict().items()}
            return found

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        strategy.start(
            grid=grid, initial_arrays=ArrayRecord(initial_model(name, clients).state_dict()), num_rounds=rounds
        )

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": PROCESSES}}
    run_simulation(server_app=server, client_app=app, num_supernodes=clients, backend_config=resources)
    return {**timed(ends), "first": first["arrays"]}


def flower_application(name: str, clients: int, rounds: int, message: Any, context: Any) -> Any:
    """An application's client in a Ray actor."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    if not CACHE:
        CACHE["clients"] = PlainClients(problem(name, clients))
    plain: PlainClients = CACHE["clients"]
    number = int(message.content["config"]["server-round"])
    start = message.content["arrays"].to_torch_state_dict()
    count = plain.train(int(context.node_config["partition-id"]), start, number, rounds)
    reply = {"arrays": ArrayRecord(plain.model.state_dict()), "metrics": MetricRecord({"num-examples": count})}
    return Message(content=RecordDict(reply), reply_to=message)


class Ends(list[float]):
    """When the work began, then the end of each round; and the processor time spent by then, children included."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: list[float] = []

    def mark(self) -> None:
        self.append(time.monotonic())
        total, me = 0.0, psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:2])
        self.cpu.append(total)


def timed(ends: Ends) -> dict[str, Any]:
    seconds, cpu = ([b - a for a, b in itertools.pairwise(found)] for found in (ends, ends.cpu))
    first = {"first_round_s": ends[1] - ends[0], "start_up_s": ends[1] - START, "start_up_cpu_s": ends.cpu[1]}
    return {"seconds": seconds, "cpu_s": cpu, **first}


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
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # where Flower's simulation fails, a thread of it stays that would keep this process for ever
    sys.exit(code)
