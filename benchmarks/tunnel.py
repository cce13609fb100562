"""The tunnel through a broker alone: MB/s, seconds per request, CPU, and what an idle device costs a day on the wire.

    python -m benchmarks tunnel [--quick] [--json]

A server and its broker in this process (mosquitto in its own), a device in another, TLS throughout. Peer: the same
requests to the same endpoint over HTTPS, in the same run. Idle: TCP payload counted by a relay before the broker, for
keep-alives and for one safety poll, plus 80 bytes of headers for each segment and its acknowledgement, laid out over a day
with the agent's own intervals (keep-alive 60 s, safety poll 1,500 s). A stock SuperNode: about 1.8 MB an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fieldfleet.processes import free_ports, listens
from fl_clients.broker_connection import BrokerConnection
from fl_clients.connection import ServerConnection, Transport, welcome
from fl_clients.tunnel import TunnelClient
from fl_core.identity import keys
from fl_core.link import topics
from fl_core.link.session import BrokerAddress, MqttSession
from fl_server.field import FieldService, write_broker_files
from fl_server.home import ListenSettings, MqttSettings, ServerHome, ServerSettings, create_home
from fl_server.superlink import SuperLink

NAME, FLEET = "device-1", "fieldfleet"
MB = 12
BLOB = "/fieldfleet/v1/repository/targets/blob.bin"
KEEPALIVE_S, SAFETY_S, MEASURED_KEEPALIVE_S = 60, 1_500, 5
SEGMENT_BYTES = 80  # IPv4 and TCP headers with timestamps are 52 to 60; the acknowledgement's share with them


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device:
        return device(json.loads(Path(args.device).read_text()))
    results: dict[str, dict[str, float]] = {}
    for broker in ("embedded", *(["mosquitto"] if mosquitto() else [])):
        results |= measure(broker, repetitions=2 if args.quick else 6)
    if args.json:
        print(json.dumps(results))
        return 0
    columns = ("down_mb_s", "request_ms", "device_cpu_ms_per_mb", "server_cpu_ms_per_mb", "idle_mb_day")
    print(f"{'':22}" + "".join(f"{column:>22}" for column in columns))
    for name, row in results.items():
        print(f"{name:22}" + "".join(f"{row[c]:22.2f}" if c in row else f"{'':22}" for c in columns))
    return 0


def mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def measure(broker: str, repetitions: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, station(Path(folder), broker) as (home, superlink, port):
        targets = home.repository / "targets"
        targets.mkdir(parents=True)
        (targets / "blob.bin").write_bytes(os.urandom(MB * 1_000_000))
        file = Path(folder) / "device.key"
        key = keys.load_private_key(file) if file.exists() else keys.create_device_key(file)
        registered = superlink.registry.register(NAME, keys.public_pem(key))
        plan = {
            "folder": folder,
            "ca": str(home.ca_file),
            "url": superlink.url,
            "port": port,
            "password": registered.mqtt_password,
            "repetitions": repetitions,
        }
        found: dict[str, dict[str, float]] = {}
        for way in ("mqtt", "https"):
            before = cpu()
            row = run_device({**plan, "way": way}, Path(folder))
            row["server_cpu_ms_per_mb"] = 1000 * (cpu() - before) / (repetitions * MB)
            found[f"{way} ({broker})" if way == "mqtt" else f"https, peer ({broker})"] = row
        return found


@contextlib.contextmanager
def station(folder: Path, broker: str) -> Iterator[tuple[ServerHome, SuperLink, int]]:
    """A server with its broker, started."""
    port, mqtt_port = free_ports(2)
    settings = MqttSettings(port=mqtt_port)
    if broker == "mosquitto":
        settings = MqttSettings(mode="external", host="127.0.0.1", port=mqtt_port)
    home = create_home(folder / "server", ServerSettings(fleet=FLEET, listen=ListenSettings(port=port), mqtt=settings))
    with contextlib.ExitStack() as stack:
        if broker == "mosquitto":
            stack.enter_context(running_mosquitto(folder, home, mqtt_port))
        superlink = SuperLink(home)
        superlink.start()
        stack.callback(superlink.stop)
        field = FieldService(home, superlink.registry, tunnel=superlink.tunnel)
        field.start()
        stack.callback(field.stop)
        yield home, superlink, mqtt_port


@contextlib.contextmanager
def running_mosquitto(folder: Path, home: ServerHome, port: int) -> Iterator[None]:
    """From the server's files; the device is registered before, since mosquitto reads them once."""
    registry = home.registry()
    key = keys.create_device_key(folder / "device.key")
    registry.register(NAME, keys.public_pem(key))
    config = write_broker_files(home, registry)
    registry.close()
    assert config is not None
    own = folder / "mosquitto.conf"
    own.write_text(config.read_text() + ("user root\n" if os.geteuid() == 0 else ""))
    process = subprocess.Popen([mosquitto() or "mosquitto", "-c", str(own)], stdout=-3, stderr=-3)
    try:
        deadline = time.monotonic() + 30
        while not listens(port):
            if time.monotonic() > deadline:
                raise TimeoutError("mosquitto did not start")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


def run_device(plan: dict[str, Any], folder: Path) -> dict[str, float]:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    command = [sys.executable, "-m", "benchmarks.tunnel", "--device", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# the device's process


def device(plan: dict[str, Any]) -> int:
    key = keys.load_private_key(Path(plan["folder"]) / "device.key")
    if plan["way"] == "https":
        connection = ServerConnection(plan["url"], Path(plan["ca"]), key)
        result = speed(connection, plan["repetitions"])
        connection.close()
    else:
        with tunnelled(plan, key, plan["port"], KEEPALIVE_S) as tunnel_connection:
            result = speed(tunnel_connection, plan["repetitions"])
        result["idle_mb_day"] = idle(plan, key)
    print(json.dumps(result))
    return 0


@contextlib.contextmanager
def tunnelled(plan: dict[str, Any], key: keys.PrivateKey, port: int, keepalive_s: int) -> Iterator[BrokerConnection]:
    tunnel = TunnelClient(key, Path(plan["ca"]))
    address = BrokerAddress(
        host="127.0.0.1",
        port=port,
        username=NAME,
        password=plan["password"],
        client_id=NAME,
        ca=Path(plan["ca"]),
        keepalive_s=keepalive_s,
    )
    down = topics.topic(FLEET, NAME, topics.DOWN)
    session = MqttSession(address, subscriptions=[down], tap=tunnel.tap, changed=tunnel.poke)
    tunnel.attach(session, FLEET, NAME)
    session.start()
    try:
        if not session.wait_connected(60):
            raise TimeoutError(session.failure)
        yield BrokerConnection(tunnel, key)
    finally:
        tunnel.close()
        session.stop()


def speed(connection: Transport, repetitions: int) -> dict[str, float]:
    welcome(connection)
    requests = [timed(lambda: welcome(connection)) for _ in range(50)]
    fetch(connection)
    before = cpu()
    seconds = [timed(lambda: fetch(connection)) for _ in range(repetitions)]
    return {
        "down_mb_s": MB / statistics.median(seconds),
        "request_ms": 1000 * statistics.median(requests),
        "device_cpu_ms_per_mb": 1000 * (cpu() - before) / (repetitions * MB),
    }


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def fetch(connection: Transport) -> None:
    size = 0
    with connection.stream("GET", BLOB, timeout=60.0) as response:
        while data := response.read1(1 << 20):
            size += len(data)
    if size != MB * 1_000_000:
        raise RuntimeError(f"{size} bytes")


def idle(plan: dict[str, Any], key: keys.PrivateKey) -> float:
    """MB a day of a device that waits: keep-alives and safety polls."""
    relay = Relay(plan["port"])
    with tunnelled(plan, key, relay.port, MEASURED_KEEPALIVE_S) as connection:
        poll = "/fieldfleet/v1/welcome"  # of the size of a poll, and a little more in its answer
        connection.request("POST", poll, limit=1 << 20)
        time.sleep(2.0)
        before = relay.wire
        polls = 5
        for _ in range(polls):
            connection.request("POST", poll, limit=1 << 20)
            time.sleep(1.0)  # its acknowledgement goes alone, as on a quiet day
        each_poll = (relay.wire - before) / polls
        before, exchanges = relay.wire, 3
        time.sleep(exchanges * MEASURED_KEEPALIVE_S + 1.0)
        each_keepalive = (relay.wire - before) / exchanges
    relay.close()
    day = 86_400
    return (each_keepalive * day / KEEPALIVE_S + each_poll * day / SAFETY_S) / 1e6


class Relay:
    """Before the broker: counts what passes as it would on the wire."""

    def __init__(self, target: int) -> None:
        self._target, self.wire = target, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                device_end, _ = self._listener.accept()
                broker_end = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((device_end, broker_end), (broker_end, device_end)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1400):
                self.wire += len(data) + SEGMENT_BYTES
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    sys.exit(main())
