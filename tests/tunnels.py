"""A server with a real broker, and devices in this process that reach it through the broker only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_clients.broker_connection import BrokerConnection
from fl_clients.tunnel import TunnelClient
from fl_core.identity import keys
from fl_core.link import topics
from fl_core.link.backoff import Backoff
from fl_core.link.session import BrokerAddress, MqttSession
from fl_server.field import FieldService, write_broker_files
from fl_server.home import ListenSettings, MqttSettings, ServerSettings, create_home
from fl_server.superlink import SuperLink
from tests.federation import new_key
from tests.helpers import eventually
from tests.mqtt_helpers import MOSQUITTO, free_port

FLEET = "test"


class Station:
    """start() ... stop(). broker: "embedded", or "mosquitto", run from the files that the server writes."""

    def __init__(self, folder: Path, broker: str, *, tls: bool = True) -> None:
        self.folder, self.port, self.external = folder, free_port(), broker == "mosquitto"
        settings = MqttSettings(port=self.port, tls=tls)
        if self.external:
            settings = MqttSettings(mode="external", host="127.0.0.1", port=self.port, tls=tls)
        listen = ListenSettings(port=free_port())
        self.home = create_home(folder / "server", ServerSettings(fleet=FLEET, listen=listen, mqtt=settings))
        self.broker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.external and self.broker is None:
            self.start_broker()
        self.superlink = SuperLink(self.home)
        self.superlink.start()
        self.field = FieldService(self.home, self.superlink.registry, tunnel=self.superlink.tunnel)
        self.field.start()

    def stop(self) -> None:
        self.stop_server()
        self.stop_broker(signal.SIGTERM)

    def stop_server(self) -> None:
        self.field.stop()
        self.superlink.stop()

    def start_broker(self) -> None:
        assert MOSQUITTO
        registry = self.home.registry()
        config = write_broker_files(self.home, registry)
        registry.close()
        assert config is not None
        own = self.folder / "mosquitto.conf"  # as root it would change to its own user, who may not read these files
        own.write_text(config.read_text() + ("user root\n" if os.geteuid() == 0 else ""))
        self.broker = subprocess.Popen([MOSQUITTO, "-c", str(own)], stdout=-3, stderr=-3)

        def accepts() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        eventually(accepts, 30)

    def stop_broker(self, number: int) -> None:
        if self.broker is not None:
            self.broker.send_signal(number)
            self.broker.wait(20)
            self.broker = None

    def register(self, name: str, key: keys.PrivateKey) -> None:
        self.superlink.registry.register(name, keys.public_pem(key))
        write_broker_files(self.home, self.superlink.registry)
        if self.broker is not None:
            self.broker.send_signal(signal.SIGHUP)


class BrokerDevice:
    """A registered device with a tunnel, and nothing else. ``port``: of the broker, or of something in between."""

    def __init__(self, station: Station, name: str, *, protocol: str = "auto", port: int = 0) -> None:
        folder = station.folder / name
        self.key = new_key(folder) if not folder.exists() else keys.load_private_key(folder / "device.key")
        station.register(name, self.key)
        self.tunnel = TunnelClient(self.key, station.home.ca_file)
        address = BrokerAddress(
            host="127.0.0.1",
            port=port or station.port,
            username=name,
            password=station.superlink.registry.mqtt_password(name) or "",
            client_id=name,
            ca=station.home.ca_file if station.home.settings.mqtt.tls else None,
            protocol=protocol,
            keepalive_s=20,
        )
        self.session = MqttSession(
            address,
            subscriptions=[topics.topic(FLEET, name, topics.DOWN)],
            tap=self.tunnel.tap,
            changed=self.tunnel.poke,
            backoff=Backoff(0.02, 0.2),
        )
        self.tunnel.attach(self.session, FLEET, name)
        self.connection = BrokerConnection(self.tunnel, self.key)

    def start(self) -> None:
        self.session.start()
        assert self.session.wait_connected(60), self.session.failure

    def stop(self) -> None:
        self.tunnel.close()
        self.session.stop()


@contextmanager
def broker_device(station: Station, name: str, *, protocol: str = "auto", port: int = 0) -> Iterator[BrokerDevice]:
    device = BrokerDevice(station, name, protocol=protocol, port=port)
    device.start()
    try:
        yield device
    finally:
        device.stop()
