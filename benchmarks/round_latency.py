"""Seconds a federated round with a trivial model and two clients takes: fieldfleet, and stock Flower 1.41 as the peer.

    python -m benchmarks round_latency [--quick]        (--quick: fewer rounds, without the peer)

Ours: ``server run`` and two ``agent run`` in separate processes over TLS with registered keys, a real torch local
update and a checkpoint on disk each round. Peer: ``flower-superlink`` and two ``flower-supernode`` as they come
(subprocess isolation, no TLS, no authentication, SQLite), FedAvg over clients that add one to three numbers.
Both are measured from outside, round to round; the first round starts the processes and is left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from fieldfleet.processes import Children, free_ports
from fl_core.learning.application import application
from fl_core.storage.log import read_log

DEVICES = ("client-0000", "client-0001")
PEER_ROUNDS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    rounds = 8 if args.quick else args.rounds
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        results["fieldfleet, training"] = ours(Path(folder) / "train", rounds, evaluate_every=0)
        results["fieldfleet, training + evaluation"] = ours(Path(folder) / "both", rounds, evaluate_every=1)
        if not args.quick:
            results["stock Flower, training"] = stock(Path(folder) / "stock")
    print(f"{'seconds per round, 2 clients':38} {'median':>8} {'fastest':>8} {'slowest':>8} {'rounds':>6}")
    for name, seconds in results.items():
        print(f"{name:38} {statistics.median(seconds):8.3f} {min(seconds):8.3f} {max(seconds):8.3f} {len(seconds):6}")
    return 0


def ours(folder: Path, rounds: int, *, evaluate_every: int) -> list[float]:
    app = application("toy_regression")
    config = app.configure()
    raw = app.generate(config, 0)
    home, out, (port,) = folder / "server", folder / "out", free_ports(1)
    with Children(folder / "logs") as children:
        init = ["server", "init", str(home), "--port", str(port), "--mqtt", "off"]
        children.run("init", init)
        for name in DEVICES:
            agent = folder / name
            raw.select([name]).write(folder / "data" / name)
            where = ["--server", f"https://127.0.0.1:{port}", "--ca", str(home / "ca" / "ca.pem")]
            children.run(f"{name}-init", ["agent", "init", str(agent), *where, "--application", app.name])
            key = str(agent / "keys" / "device.pub")
            children.run(f"{name}-register", ["server", "register", key, "--name", name, "--home", str(home)])
        settings = ["--set", f"algorithm.evaluate_every={evaluate_every}", "--set", "algorithm.min_clients=2"]
        run = ["server", "run", app.name, "--home", str(home), "--rounds", str(rounds), "--out", str(out), "--stay"]
        children.start("server", [*run, *settings])
        log = folder / "logs" / "server.log"
        children.until(lambda: "listening" in log.read_text(), 60, "the server's start")
        for name in DEVICES:
            children.start(
                name, ["agent", "run", str(folder / name), "--data", str(folder / "data" / name), "--no-infer"]
            )
        children.until(lambda: (out / "final").is_dir(), 300, "the federation")
    return [float(entry["seconds"]) for entry in read_log(out / "history.jsonl")][1:]


PEER_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "peer"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "peer.app:server"
clientapp = "peer.app:client"
[tool.flwr.app.config]
"""

PEER_APP = """
import os, time
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    arrays = [a + 1 for a in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

@server.main()
def main(grid, context):
    def mark(number, arrays):
        with open(os.environ["PEER_TIMES"], "a") as file:
            file.write(f"{time.time()}\\n")
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    rounds = int(os.environ["PEER_ROUNDS"])
    strategy.start(grid, ArrayRecord([np.zeros(3, np.float32)]), num_rounds=rounds, evaluate_fn=mark)
"""


def stock(folder: Path) -> list[float]:
    """Seconds of each round after the first, from the times at which the strategy evaluated the global model."""
    app, times = folder / "peer", folder / "times"
    (app / "peer").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PEER_PROJECT)
    (app / "peer" / "__init__.py").touch()
    (app / "peer" / "app.py").write_text(textwrap.dedent(PEER_APP))
    port, *nodes = free_ports(3)
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PEER_TIMES": str(times),
        "PEER_ROUNDS": str(PEER_ROUNDS),
    }
    commands = [
        ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), "--database", "state.db"]
    ]
    for number, node in enumerate(nodes):
        where = ["--superlink", f"127.0.0.1:{port}", "--port", str(node)]
        share = f"partition-id={number} num-partitions=2"
        commands.append(["flower-supernode", "--insecure", *where, "--node-config", share])
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.log").open("ab") as log:
                path = [str(binaries / command[0]), *command[1:]]
                running.append(
                    subprocess.Popen(path, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
                )
            if len(running) == 1:
                until(lambda: answers(f"http://127.0.0.1:{port}/health"), 60)
        submit(app, f"http://127.0.0.1:{port}/v1/control/start-run")
        until(lambda: times.exists() and len(times.read_text().split()) > PEER_ROUNDS, 240)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    marks = [float(line) for line in times.read_text().split()]
    return [later - earlier for earlier, later in itertools.pairwise(marks[1:])]


def submit(app: Path, url: str) -> None:
    """What ``flwr run`` does; that command itself does not start beside amqtt, which holds typer at 0.15."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab

    content = build_fab_from_disk(app)
    request = StartRunRequest(fab=Fab(content=content))
    headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    call = urllib.request.Request(url, request.SerializeToString(), headers)
    with urllib.request.urlopen(call, timeout=30) as answer:
        if answer.status != 200:
            raise RuntimeError(f"the peer refused the run: {answer.status}")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
