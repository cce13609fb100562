"""Aggregation: speed from decoded arrays beside memcpy and Flower's FedAvg, and the server's memory by number of clients.

    python -m benchmarks aggregation [--clients 50,200,1000] [--quick] [--json]

1. Replies as decoded float32 arrays of 5 MB, more of them than fit into any cache, are summed by MeanAggregator (float64),
   copied by numpy, and aggregated by Flower 1.41, in turn in one process; medians, and the largest deviation of the results.
2. For each number of clients a fresh ``fieldfleet server run`` gets one round of 5 MB replies over TLS through the real
   upload path. Printed: its peak resident memory above that before the round; the bound is three models and 64 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agent_memory import status
from fieldfleet.processes import Children, free_ports
from fl_clients.connection import ServerConnection, welcome
from fl_clients.training.fleet import FleetClient
from fl_core.algorithms.base import Update
from fl_core.algorithms.fedavg import build
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.flower import adapter, wire
from fl_core.flower.messages import Reply, Request
from fl_core.identity import keys
from fl_server.home import ServerHome

FEATURES, HIDDEN = 1024, 1216  # toy_regression with 1.25 million parameters: 5 MB
SIGN_OF_LIFE = 1800.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks aggregation", description=__doc__)
    parser.add_argument("--clients", default="50,200,1000", help="numbers of clients, one server process each")
    parser.add_argument("--replies", type=int, default=64, help="decoded replies of the first part")
    parser.add_argument("--quick", action="store_true", help="20 and 60 clients, 32 replies")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    counts = [20, 60] if args.quick else [int(n) for n in args.clients.split(",")]
    result: dict[str, Any] = {"arithmetic": arithmetic(32 if args.quick else args.replies), "server": []}
    if not args.json:
        print_arithmetic(result["arithmetic"])
    for count in counts:
        result["server"].append(server_memory(count))
        if not args.json:
            print_memory(result["server"][-1])
    if args.json:
        print(json.dumps(result))
    return 0


# 1. arithmetic


def arithmetic(replies: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"body": (HIDDEN, FEATURES), "bias": (HIDDEN,)}
    updates = [{n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()} for _ in range(replies)]
    weights = [float(w) for w in rng.integers(1, 100, replies)]
    size = sum(a.nbytes for u in updates for a in u.values())
    target = [{n: np.empty_like(a) for n, a in u.items()} for u in updates[: replies // 2]]
    for table in target:
        for a in table.values():
            a.fill(0)
    results: dict[str, Arrays] = {}

    def ours() -> None:
        aggregator = build(AlgorithmConfig()).aggregator
        state = aggregator.begin(1, updates[0])
        for update, weight in zip(updates, weights, strict=True):
            aggregator.add(state, Update(arrays=update, weight=weight))
        results["ours"] = aggregator.finish(state)

    def copied() -> None:
        for i, update in enumerate(updates):
            for name, a in update.items():
                np.copyto(target[i % len(target)][name], a)

    peers: dict[str, Callable[[], None]] = {
        "fieldfleet": ours,
        "memory copy": copied,
        "Flower FedAvg": flower(updates, weights, results),
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(9):
        for name, run in peers.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    deviation = max(float(np.abs(results["ours"][n] - results["flower"][n]).max()) for n in shapes)
    return {
        "replies": replies,
        "bytes": size,
        "gb_per_s": {name: size / value / 1e9 for name, value in medians.items()},
        "ratio_to_memory_copy": statistics.median(
            c / o for c, o in zip(seconds["memory copy"], seconds["fieldfleet"], strict=True)
        ),
        "deviation_from_flower": deviation,
    }


def flower(updates: list[Arrays], weights: list[float], results: dict[str, Arrays]) -> Callable[[], None]:
    """Flower's own aggregation of the same replies; its records are made before the clock starts."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({n: Array(np.asarray(a)) for n, a in update.items()}),
                "metrics": MetricRecord({"num-examples": int(weight)}),
            }
        )
        for update, weight in zip(updates, weights, strict=True)
    ]

    def run() -> None:
        found = aggregate_arrayrecords(records, "num-examples")
        results["flower"] = {n: a.numpy() for n, a in found.items()}

    return run


def print_arithmetic(found: dict[str, Any]) -> None:
    print(f"sum of {found['replies']} decoded replies, {found['bytes'] / 1e6:.0f} MB in all")
    for name, value in found["gb_per_s"].items():
        print(f"  {name:14} {value:6.2f} GB/s")
    print(f"  of memory copy {found['ratio_to_memory_copy']:6.2f} (median of 9 pairs)")
    print(f"  largest deviation from Flower's result {found['deviation_from_flower']:.1e}")


# 2. memory


def server_memory(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary, Children(Path(temporary) / "logs") as children:
        folder = Path(temporary)
        home, out, (port,) = folder / "server", folder / "out", free_ports(1)
        children.run("init", ["server", "init", str(home), "--port", str(port), "--mqtt", "off"])
        devices = registered(ServerHome(home), folder, count)
        settings = [f"data.features={FEATURES}", f"model.hidden={HIDDEN}", "algorithm.evaluate_every=0"]
        settings += [f"algorithm.min_clients={count}", "algorithm.deadline_s=3000"]
        run = ["server", "run", "toy_regression", "--home", str(home), "--rounds", "1", "--out", str(out)]
        run += ["--wait", "900", "--stay", *(part for s in settings for part in ("--set", s))]
        server = children.start("server", run)
        log = folder / "logs" / "server.log"
        children.until(lambda: "listening" in log.read_text(), 60, "the server's start")
        ca, url = home / "ca" / "ca.pem", f"https://127.0.0.1:{port}"
        clients = [FleetClient(ServerConnection(url, ca, key)) for key in devices]
        before = status(server.pid)["VmRSS"]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(join, clients))
            began = time.perf_counter()
            sizes = list(pool.map(answer, clients))
        children.until(lambda: (out / "final").is_dir(), 600, "the round")
        seconds = time.perf_counter() - began
        found = status(server.pid)
        return {
            "clients": count,
            "model_mb": sizes[0] / 1e6,
            "before_mb": before,
            "growth_mb": found["VmHWM"] - before,
            "bound_mb": 3 * sizes[0] / 1e6 + 64,
            "seconds": seconds,
            "mb_per_s": sum(sizes) / 1e6 / seconds,
        }


def registered(home: ServerHome, folder: Path, count: int) -> list[keys.PrivateKey]:
    registry, found = home.registry(), []
    for i in range(count):
        key = keys.create_device_key(folder / "keys" / f"{i}.key")
        registry.register(f"client-{i:04}", keys.public_pem(key))
        found.append(key)
    registry.close()
    return found


def join(client: FleetClient) -> None:
    client.activate(welcome(client.connection).node_id)
    client.wait(0, every=SIGN_OF_LIFE)
    client.connection.close()


def answer(client: FleetClient) -> int:
    """Bytes of the arrays; each client's differ, so that nothing is shared in the store."""
    from flwr.app import Message

    instruction = client.receive(600, every=SIGN_OF_LIFE)
    if instruction is None:
        raise RuntimeError("no instruction came")
    asked = adapter.inflate(instruction.message_id, dict(instruction.objects), origin="server")
    request = Request.from_record(asked.content, origin="server")
    rng = np.random.default_rng(client.node.node_id)
    arrays = {n: (a + rng.standard_normal(a.shape)).astype(a.dtype) for n, a in request.arrays.items()}
    reply = Message(Reply(num_examples=10, metrics={"loss": 1.0}, arrays=arrays).to_record(), reply_to=asked)
    envelope, tree, objects = adapter.deflate(reply)
    client.push(wire.WireReply(instruction.run_id, instruction.message_id, envelope, tree, objects))
    client.connection.close()
    return sum(a.nbytes for a in arrays.values())


def print_memory(found: dict[str, Any]) -> None:
    print(
        f"{found['clients']:5} clients x {found['model_mb']:.1f} MB: peak {found['growth_mb']:.0f} MB above "
        f"{found['before_mb']:.0f} MB (bound {found['bound_mb']:.0f}); {found['seconds']:.1f} s, "
        f"{found['mb_per_s']:.0f} MB/s end to end"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
