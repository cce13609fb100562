"""Real brokers and sessions for the MQTT tests: amqtt as the server embeds it, and mosquitto where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fl_core.link import topics
from fl_core.link.backoff import Backoff
from fl_core.link.envelope import Envelope, decode, encode
from fl_core.link.session import BrokerAddress, MqttSession, Outgoing
from fl_server import mosquitto
from fl_server.broker import Accounts, EmbeddedBroker
from tests.helpers import eventually

FLEET = "fleet-1"
PASSWORDS = {"van-1": "first", "van-2": "second", topics.SERVER_ACCOUNT: "server", topics.OPERATOR_ACCOUNT: "operator"}
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
BROKERS = ["embedded", pytest.param("mosquitto", marks=needs_mosquitto)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """A real mosquitto process with the files that the server writes for it."""

    def __init__(self, folder: Path, *, passwords: dict[str, str] | None = None, port: int = 0, **tls: Path) -> None:
        self.port = port or free_port()
        self.folder, self.process = folder, None
        listener = mosquitto.Listener(port=self.port, host="127.0.0.1", **tls)
        self.config = mosquitto.write_files(folder, fleet=FLEET, accounts=passwords or PASSWORDS, listener=listener)
        if os.geteuid() == 0:  # it would change to its own user, who may not read these files
            self.config.write_text(self.config.read_text() + "user root\n")

    process: subprocess.Popen[bytes] | None

    def start(self) -> None:
        assert MOSQUITTO
        self.process = subprocess.Popen([MOSQUITTO, "-c", str(self.config)], stdout=-3, stderr=-3)
        eventually(self._accepts)

    def _accepts(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "mosquitto ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)


def embedded(port: int = 0, passwords: dict[str, str] | None = None, **options: Any) -> EmbeddedBroker:
    accounts = Accounts(FLEET, (passwords or PASSWORDS).get)
    return EmbeddedBroker(
        accounts=accounts, host="127.0.0.1", port=port, certificate=options.pop("certificate", None), **options
    )


@contextmanager
def running_broker(kind: str, folder: Path) -> Iterator[Any]:
    """Something with ``port``, ``start`` and ``stop`` that listens."""
    broker = embedded() if kind == "embedded" else Mosquitto(folder)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def address(name: str, port: int, **changes: Any) -> BrokerAddress:
    values = {
        "host": "127.0.0.1",
        "port": port,
        "username": name,
        "password": PASSWORDS.get(name, ""),
        "client_id": name,
        "keepalive_s": 20,
    }
    return BrokerAddress(**{**values, **changes})


@contextmanager
def session(name: str, port: int, subscriptions: list[str] | None = None, **options: Any) -> Iterator[MqttSession]:
    """A started session, ended with a farewell-less disconnect."""
    changes = options.pop("changes", {})
    opened = MqttSession(
        address(name, port, **changes), subscriptions=subscriptions or [], backoff=Backoff(0.02, 0.1), **options
    )
    opened.start()
    try:
        yield opened
    finally:
        opened.stop()


@contextmanager
def watcher(port: int, **options: Any) -> Iterator[MqttSession]:
    """The server's account, subscribed to everything that devices say."""
    filters = [topics.every_device(FLEET, kind) for kind in topics.FROM_DEVICE]
    with session(topics.SERVER_ACCOUNT, port, filters, **options) as opened:
        assert opened.wait_connected(10), opened.failure
        yield opened


def device_topic(name: str, kind: str) -> str:
    return topics.topic(FLEET, name, kind)


def state_of(name: str, kind: str, boot: int = 1) -> Callable[[int], Outgoing]:
    def message(connection: int) -> Outgoing:
        content = Envelope(type=kind, boot=boot, connection=connection)
        return Outgoing(topic=device_topic(name, topics.STATE), payload=encode(content), retain=True)

    return message


def next_envelope(opened: MqttSession, timeout: float = 10.0) -> tuple[str, Envelope]:
    message = opened.receive(timeout)
    assert message is not None, "no message"
    return message.topic, decode(message.payload, origin=message.topic)
