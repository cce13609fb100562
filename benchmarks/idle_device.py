"""What an idle device costs: resident memory, and bytes a day on the wire, beside a stock flower-supernode.

    python -m benchmarks idle_device [--minutes 6] [--json] [--quick]     (--quick: 1.5 minutes, without the peer)

One server with its embedded broker; beside each other five real ``agent run``: HTTPS long poll, HTTPS with wake-ups
over MQTT (each able to train, and inference only) and MQTT alone. Each has a model installed and has inferred with it;
torch is not loaded before a round asks for it. Every agent reaches server and broker through TCP proxies of its own,
which count bytes in both directions; to each piece that passes they add 104 bytes for its IP and TCP headers and its
acknowledgement. The peer is ``flower-superlink`` and ``flower-supernode`` as they come, without TLS.

Memory is VmRSS of the device's processes at the end (Pss too: what is not shared). Bytes of a day are an upper bound:
what was seen in the window (polls and pings at their present, shorter intervals) as a rate, plus the rarer contacts of a
day, each at a price. Welcome and repository (every 6 h) cost as much as the most expensive connection of a restarted
agent, TLS handshake included. So do, without MQTT, telemetry (every 30 min) and looks at the repository. With MQTT their
prices are measured after the window: the safety question (every 25 min) by ringing the device after all its HTTPS
connections were cut, so that a handshake is in it; telemetry by the command ``report``, which with its answer, the same facts
uncompressed, is larger than a record with its receipt. The peer polls every 3 s: its rate needs no such addition.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._tcp_proxy import TcpProxy
from fieldfleet.processes import Children, free_ports
from fl_core.learning.application import application
from fl_core.link import topics
from fl_core.link.envelope import Envelope, encode
from fl_core.link.session import MqttSession, Outgoing
from fl_server.field import service_address
from fl_server.home import ServerHome

APPLICATION = "toy_regression"
DAY_S, SETTLE_S, IDLE_S, SILENCE_S = 86_400.0, 45.0, 3.0, 5.0
TELEMETRY_A_DAY, SAFETY_A_DAY, WELCOME_A_DAY = 48, 58, 8


@dataclass(frozen=True)
class Case:
    """One kind of device. rare: contacts of a day, beside polls and pings, at the price of a new connection. questions,
    telemetry: those whose own prices are measured.
    """

    name: str
    options: tuple[str, ...] = ()
    mqtt: bool = True
    https: bool = True
    rare: int = WELCOME_A_DAY
    questions: int = 0
    telemetry: int = 0


CASES = (
    Case("https, able to train", mqtt=False, rare=TELEMETRY_A_DAY + WELCOME_A_DAY),
    Case("https, inference only", ("--no-train",), mqtt=False, rare=TELEMETRY_A_DAY + WELCOME_A_DAY + 24),
    Case("https + mqtt, able to train", questions=SAFETY_A_DAY, telemetry=TELEMETRY_A_DAY),
    Case("https + mqtt, inference only", ("--no-train",), telemetry=TELEMETRY_A_DAY),
    Case("mqtt alone, able to train", https=False, questions=SAFETY_A_DAY, telemetry=TELEMETRY_A_DAY),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    minutes = args.minutes or (1.5 if args.quick else 6.0)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), minutes * 60, peer=not args.quick)
    if args.json:
        print(json.dumps(found))
        return 0
    print(
        f"{'device':32} {'RSS MB':>8} {'PSS MB':>8} {'MB/day at most':>15} {'of it quiet':>12} {'new contact, B':>15} "
        f"{'question, B':>12} {'telemetry, B':>13}"
    )
    for name, row in found.items():
        cells = [row["rss_mb"], row["pss_mb"], row["mb_a_day"], row["quiet_mb_a_day"]]
        prices = [row["contact_bytes"], row["question_bytes"], row["telemetry_bytes"]]
        print(
            f"{name:32} {cells[0]:8.1f} {cells[1]:8.1f} {cells[2]:15.2f} {cells[3]:12.2f} {prices[0]:15.0f} "
            f"{prices[1]:12.0f} {prices[2]:13.0f}"
        )
    return 0


def measure(folder: Path, seconds: float, *, peer: bool) -> dict[str, Any]:
    home, (port, mqtt_port) = folder / "server", free_ports(2)
    with Children(folder / "logs") as children:
        place = ["--port", str(port), "--mqtt-port", str(mqtt_port)]
        children.run("init", ["server", "init", str(home), *place])
        publish(folder, home, children)
        children.start("server", ["server", "start", "--home", str(home)])
        log = folder / "logs" / "server.log"
        children.until(lambda: "listening" in log.read_text(), 60, "the server's start")
        devices = [Device(folder, index, case, home, port, mqtt_port) for index, case in enumerate(CASES)]
        stock = Peer(folder / "peer") if peer else None
        try:
            for device in devices:
                device.enrol(children)
                device.start()
            for device in devices:
                children.until(device.settled, 180, f"the first inference of {device.case.name}")
                device.restart()  # everything is installed: now a contact costs what it costs on any day
            if stock is not None:
                stock.start()
            _wait(children, SETTLE_S)
            for device in devices:
                device.begin()
            if stock is not None:
                stock.begin()
            began = time.monotonic()
            _wait(children, seconds)
            window = time.monotonic() - began
            quiet = {device.name: device.quiet_a_day(window) for device in devices}
            resident = {device.name: memory([device.pid]) for device in devices}
            for device in devices:
                device.ask_prices(children)
            found = {
                device.case.name: device.result(window, quiet[device.name], resident[device.name]) for device in devices
            }
            if stock is not None:
                found["stock supernode, no TLS"] = stock.result(window)
            return found
        finally:
            for device in devices:
                device.stop()
            if stock is not None:
                stock.stop()


def publish(folder: Path, home: Path, children: Children) -> None:
    app = application(APPLICATION)
    raw = app.generate(app.configure(["data.clients=2"]), 0)
    raw.select(list(raw.client_ids()[:1])).write(folder / "data")  # type: ignore[attr-defined]
    options = ["--data", "generated", "--set", "pretrain.epochs=1"]
    children.run("pretrain", ["pretrain", APPLICATION, "--out", str(folder / "model"), *options])
    children.run("export", ["export", str(folder / "model"), "--out", str(folder / "bundle")])
    children.run("publish", ["publish", str(folder / "bundle"), "--repo", str(home / "repository")])


class Device:
    """A real agent behind its own proxies."""

    def __init__(self, folder: Path, index: int, case: Case, home: Path, port: int, mqtt_port: int) -> None:
        self.case, self.home, self._folder = case, home, folder
        self.name, self.agent, self.data = f"device-{index}", folder / f"device-{index}", folder / "data"
        self._https, self._mqtt = TcpProxy(port).start(), TcpProxy(mqtt_port).start()
        self._process: subprocess.Popen[bytes] | None = None
        self._before = self._restarted = self._question = self._telemetry = 0

    def enrol(self, children: Children) -> None:
        where = ["--server", f"https://127.0.0.1:{self._https.port}"] if self.case.https else ["--transport", "mqtt"]
        options = [*where, "--ca", str(self.home / "ca" / "ca.pem"), "--application", APPLICATION]
        children.run(f"{self.name}-init", ["agent", "init", str(self.agent), *options])
        key = str(self.agent / "keys" / "device.pub")
        children.run(
            f"{self.name}-register", ["server", "register", key, "--name", self.name, "--home", str(self.home)]
        )
        settings = self.agent / "agent.toml"
        text = settings.read_text().replace("idle_s = 300.0", f"idle_s = {IDLE_S}")
        if not self.case.mqtt:
            text = text.replace("[mqtt]\nenabled = true", "[mqtt]\nenabled = false")
        settings.write_text(text)
        if self.case.mqtt:
            account = self._folder / f"{self.name}.json"
            children.run(
                f"{self.name}-account",
                ["server", "account", self.name, "--home", str(self.home), "--out", str(account)],
            )
            table = json.loads(account.read_text())
            table["broker"]["port"] = self._mqtt.port  # through our proxy
            account.write_text(json.dumps(table))
            children.run(f"{self.name}-take", ["agent", "account", str(self.agent), str(account)])

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "fieldfleet",
            "agent",
            "run",
            str(self.agent),
            "--data",
            str(self.data),
        ]
        with (self._folder / "logs" / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen([*command, *self.case.options], stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code, when it has ended."""
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def each_proxy(self, do: Callable[[TcpProxy], None]) -> None:
        for proxy in (self._https, self._mqtt):
            do(proxy)

    def restart(self) -> None:
        self.stop_process()
        self._restarted = len(self._all())
        self.start()

    def settled(self) -> bool:
        return any(self.agent.glob(f"applications/{APPLICATION}/predictions/*"))

    def begin(self) -> None:
        self._before = self._wire()

    def quiet_a_day(self, window: float) -> float:
        """Bytes, at the rate of the window."""
        if self.ended is not None:
            raise RuntimeError(f"{self.case.name} ended: see {self._folder}/logs/{self.name}.log")
        return (self._wire() - self._before) * DAY_S / window

    def ask_prices(self, children: Children) -> None:
        if self.case.questions:
            self._question = self._price(children, self._ring)
        if self.case.telemetry:
            command = ["server", "command", self.name, "report", "--home", str(self.home)]
            self._telemetry = self._price(children, lambda: children.run(f"{self.name}-report", command))

    def _ring(self) -> None:
        """As the server does when a message waits."""
        home = ServerHome(self.home)
        session = MqttSession(service_address(home, topics.OPERATOR_ACCOUNT))
        session.start()
        try:
            topic = topics.topic(home.settings.fleet, self.name, topics.COMMAND)
            wake = Outgoing(topic=topic, payload=encode(Envelope(type="wake")))
            if not session.wait_connected(20) or not session.deliver(wake, 20):
                raise RuntimeError(f"{self.name} could not be rung: {session.failure}")
        finally:
            session.stop()

    def _price(self, children: Children, do: Callable[[], object]) -> int:
        """Bytes of what the device does then, all HTTPS connections made anew, until it has been silent for 5 s."""
        self._https.reset()
        _wait(children, 2.0)
        before = self._wire()
        do()
        children.until(lambda: self._wire() > before, 30, f"an answer of {self.name}")
        seen, since = self._wire(), time.monotonic()
        while time.monotonic() - since < SILENCE_S:
            time.sleep(0.2)
            if self._wire() != seen:
                seen, since = self._wire(), time.monotonic()
        return seen - before

    def result(self, window: float, quiet: float, resident: dict[str, float]) -> dict[str, float]:
        case = self.case
        contact = max(c.bursts[0][2] for c in self._all()[self._restarted :] if c.bursts)
        rare = case.rare * contact + case.questions * self._question + case.telemetry * self._telemetry
        return {
            **resident,
            "quiet_mb_a_day": quiet / 1e6,
            "contact_bytes": contact,
            "question_bytes": self._question,
            "telemetry_bytes": self._telemetry,
            "mb_a_day": (quiet + rare) / 1e6,
            "window_s": window,
        }

    def _all(self) -> list[Any]:
        return [*self._https.connections, *self._mqtt.connections]

    def _wire(self) -> int:
        return self._https.totals()["wire"] + self._mqtt.totals()["wire"]

    def stop_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)

    def stop(self) -> None:
        self.stop_process()
        self._https.stop()
        self._mqtt.stop()


class Peer:
    """Stock Flower: a SuperLink, and a SuperNode behind a proxy."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._running = folder, list[subprocess.Popen[bytes]]()
        self._port, self._node = free_ports(2)
        self._proxy: TcpProxy | None = None
        self._before = 0

    def start(self) -> None:
        link = ["--insecure", "--host", "127.0.0.1", "--port", str(self._port), "--database", "state.db"]
        self._spawn("flower-superlink", link)
        self._proxy = TcpProxy(self._port).start()
        node = ["--insecure", "--superlink", f"127.0.0.1:{self._proxy.port}", "--port", str(self._node)]
        self._spawn("flower-supernode", node)

    def _spawn(self, command: str, options: list[str]) -> None:
        binaries = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self._folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        path = [str(binaries / command), *options]
        with (self._folder / f"{command}.log").open("ab") as log:
            self._running.append(
                subprocess.Popen(
                    path, stdout=log, stderr=log, env=environment, cwd=self._folder, start_new_session=True
                )
            )

    def begin(self) -> None:
        assert self._proxy is not None
        self._before = self._proxy.totals()["wire"]

    def result(self, window: float) -> dict[str, float]:
        assert self._proxy is not None
        wire = self._proxy.totals()["wire"] - self._before
        if not wire:
            raise RuntimeError(f"the stock supernode sent nothing: see {self._folder}")
        quiet = wire * DAY_S / window / 1e6
        found = memory([self._running[-1].pid])
        prices = {"contact_bytes": 0, "question_bytes": 0, "telemetry_bytes": 0}
        return {**found, **prices, "quiet_mb_a_day": quiet, "mb_a_day": quiet, "window_s": window}

    def stop(self) -> None:
        for process in self._running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._proxy is not None:
            self._proxy.stop()


def memory(pids: list[int]) -> dict[str, float]:
    """MB resident of these processes and all below them."""
    sizes = {"rss_mb": 0.0, "pss_mb": 0.0}
    for pid in family(pids):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        table = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
        sizes["rss_mb"] += int(table["Rss"]) / 1024
        sizes["pss_mb"] += int(table["Pss"]) / 1024
    return sizes


def family(pids: list[int]) -> list[int]:
    found = list(pids)
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def _wait(children: Children, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        children.check()
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


if __name__ == "__main__":
    sys.exit(main())
