"""Seconds a federated round with two clients takes: fieldfleet over HTTPS and MQTT, stock Flower 1.41 as the peer.

    python -m benchmarks round_latency [--quick] [--transport https,mqtt] [--broker embedded,mosquitto] [--mb 0,12] [--json]

(--quick: the trivial model, fewer rounds, without the peer.) Ours: ``server run`` and two ``agent run`` in separate
processes over TLS with registered keys, a real torch local update and a checkpoint on disk each round, each of which
must count both devices; over MQTT the devices reach nothing but the broker. Peer: ``flower-superlink`` and two ``flower-supernode`` as they come (subprocess
isolation, no TLS, no authentication, SQLite), FedAvg over clients that add one to an array of the same size.
Both are measured from outside, round to round; the first round starts the processes and is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fieldfleet.processes import Children, free_ports
from fl_core.learning.application import application
from fl_core.storage.log import read_log

DEVICES = ("client-0000", "client-0001")
# One wide layer and few examples: a round whose work is moving the model. A rate at which its training stays finite.
SIZED = ("model.hidden=4096", "model.norm=none", "data.examples_per_client=8", "optimizer.lr=0.0001")
PEER_ROUNDS = 4


@dataclass(frozen=True)
class Case:
    """transport: "https", "mqtt over embedded" or "mqtt over mosquitto". mb: size of the model, 0 = trivial."""

    transport: str
    mb: int = 0
    evaluate_every: int = 0

    @property
    def name(self) -> str:
        model = f"{self.mb} MB" if self.mb else "trivial model"
        return f"fieldfleet, {self.transport}, {model}{', with evaluation' if self.evaluate_every else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--transport", default="https,mqtt")
    parser.add_argument("--broker", default="embedded,mosquitto", help="for mqtt")
    parser.add_argument("--mb", default="", help="sizes of models (default: 0,12; 0 = trivial; --quick: 0)")
    parser.add_argument("--no-peer", action="store_true", help="without stock Flower")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    rounds = 8 if args.quick else args.rounds
    sizes = [int(mb) for mb in (args.mb or ("0" if args.quick else "0,12")).split(",")]
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases(args.transport.split(","), args.broker.split(","), sizes)):
            results[case.name] = ours(Path(folder) / f"ours-{number}", rounds, case)
            say(case.name, results[case.name])
        for mb in [] if args.quick or args.no_peer else sizes:
            name = f"stock Flower, http, {f'{mb} MB' if mb else 'trivial model'}"
            results[name] = stock(Path(folder) / f"stock-{mb}", mb)
            say(name, results[name])
    if args.json:
        print(json.dumps({name: {"median": statistics.median(s), "seconds": s} for name, s in results.items()}))
        return 0
    print(
        f"{'seconds per round, 2 clients':60} {'median':>8} {'fastest':>8} {'slowest':>8} {'rounds':>6} {'peer / ours':>11}"
    )
    for name, seconds in results.items():
        peer = next((s for n, s in results.items() if n.startswith("stock") and n.endswith(name.split(", ")[2])), None)
        ratio = f"{statistics.median(peer) / statistics.median(seconds):11.1f}" if peer else ""
        print(
            f"{name:60} {statistics.median(seconds):8.3f} {min(seconds):8.3f} {max(seconds):8.3f} {len(seconds):6} {ratio}"
        )
    return 0


def cases(transports: Sequence[str], brokers: Sequence[str], sizes: Sequence[int]) -> list[Case]:
    found = []
    for mb in sizes:
        if "https" in transports:
            found += [Case("https", mb)] + ([Case("https", 0, 1)] if mb == 0 else [])
        if "mqtt" in transports:
            found += [Case(f"mqtt over {broker}", mb) for broker in brokers if broker != "mosquitto" or mosquitto()]
    return found


def say(name: str, seconds: list[float]) -> None:
    print(f"{name}: median {statistics.median(seconds):.3f} s", file=sys.stderr, flush=True)


def mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def ours(folder: Path, rounds: int, case: Case) -> list[float]:
    app = application("toy_regression")
    settings = list(SIZED if case.mb else [])
    if case.mb:
        settings.append(f"data.features={case.mb * 250_000 // 4096}")
    config = app.configure(settings)
    raw = app.generate(config, 0)
    home, out, (port, mqtt_port) = folder / "server", folder / "out", free_ports(2)
    external, through_broker = case.transport.endswith("mosquitto"), case.transport != "https"
    with Children(folder / "logs") as children:
        place = ["--mqtt", f"127.0.0.1:{mqtt_port}"] if external else ["--mqtt-port", str(mqtt_port)]
        place = place if through_broker else ["--mqtt", "off"]
        children.run("init", ["server", "init", str(home), "--port", str(port), *place])
        for name in DEVICES:
            raw.select([name]).write(folder / "data" / name)  # type: ignore[attr-defined]
            enrol(folder, name, home, [] if through_broker else ["--server", f"https://127.0.0.1:{port}"], children)
        broker = start_mosquitto(folder, home) if external else None
        try:
            chosen = [f"algorithm.evaluate_every={case.evaluate_every}", "algorithm.min_clients=2", *settings]
            run = ["server", "run", app.name, "--home", str(home), "--rounds", str(rounds), "--out", str(out), "--stay"]
            children.start("server", [*run, *(word for setting in chosen for word in ("--set", setting))])
            log = folder / "logs" / "server.log"
            children.until(lambda: "listening" in log.read_text(), 60, "the server's start")
            for name in DEVICES:
                data = str(folder / "data" / name)
                children.start(name, ["agent", "run", str(folder / name), "--data", data, "--no-infer"])
            children.until(lambda: (out / "final").is_dir(), 400, "the federation")
        finally:
            if broker is not None:
                broker.kill()
                broker.wait()
    entries = list(read_log(out / "history.jsonl"))
    wrong = [entry["round"] for entry in entries if len(entry["clients"]) != len(DEVICES) or not entry["applied"]]
    if wrong:
        raise RuntimeError(f"{case.name}: rounds {wrong} did not count both devices: their times say nothing")
    return [float(entry["seconds"]) for entry in entries][1:]


def enrol(folder: Path, name: str, home: Path, where: Sequence[str], children: Children) -> None:
    agent = folder / name
    options = [*(where or ["--transport", "mqtt"]), "--ca", str(home / "ca" / "ca.pem")]
    children.run(f"{name}-init", ["agent", "init", str(agent), *options, "--application", "toy_regression"])
    key = str(agent / "keys" / "device.pub")
    children.run(f"{name}-register", ["server", "register", key, "--name", name, "--home", str(home)])
    if not where:
        account = str(folder / f"{name}.json")
        children.run(f"{name}-account", ["server", "account", name, "--home", str(home), "--out", account])
        children.run(f"{name}-take", ["agent", "account", str(agent), account])


def start_mosquitto(folder: Path, home: Path) -> subprocess.Popen[bytes]:
    """From the files that the server has written."""
    config, text = folder / "mosquitto.conf", (home / "broker" / "mosquitto.conf").read_text()
    config.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    return subprocess.Popen([mosquitto() or "mosquitto", "-c", str(config)], stdout=-3, stderr=-3)


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
    initial = ArrayRecord([np.zeros(int(os.environ["PEER_VALUES"]), np.float32)])
    strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=mark)
"""


def stock(folder: Path, mb: int = 0) -> list[float]:
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
        "PEER_VALUES": str(mb * 250_000 or 3),
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
