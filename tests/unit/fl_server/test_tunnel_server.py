"""The tunnel with real brokers, a real server and a device in this process: everything but HTTPS."""

from __future__ import annotations

import hashlib
import random
import signal
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from flwr.app import MessageType

from fl_clients.auto_connection import AutoConnection
from fl_clients.broker_connection import BrokerConnection
from fl_clients.connection import ServerConnection, Unreachable, Unregistered, open_transport, welcome
from fl_clients.edge.broker_account import write_account
from fl_clients.edge.home import AgentHome
from fl_clients.edge.relay import repository_at
from fl_clients.edge.settings import settings_text
from fl_clients.enrolment import rotate_key
from fl_clients.training.fleet import FleetClient
from fl_core.flower.messages import Reply
from fl_core.identity import keys
from fl_core.link import topics
from fl_core.link.session import Message, Outgoing
from fl_server.field import device_account
from fl_server.metrics import MetricsService
from fl_server.superlink import SuperLink
from tests.federation import new_key, request
from tests.helpers import eventually
from tests.mqtt_helpers import device_topic, embedded, needs_mosquitto, session
from tests.mqtt_proxy import honest, proxy_before
from tests.tunnels import BrokerDevice, Station, broker_device
from tests.unit.fl_server.test_link_grid import answer

BLOB = random.Random(0).randbytes(6 << 20)
BLOB_PATH = "/fieldfleet/v1/repository/targets/blob.bin"
KINDS = [
    ("embedded", "auto"),
    pytest.param("mosquitto", "5", marks=needs_mosquitto),
    pytest.param("mosquitto", "311", marks=needs_mosquitto),
]


def add_blob(station: Station) -> None:
    folder = station.home.repository / "targets"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "blob.bin").write_bytes(BLOB)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """Without TLS, for proxies that read MQTT."""
    station = Station(tmp_path_factory.mktemp("plain"), "embedded", tls=False)
    station.start()
    add_blob(station)
    yield station
    station.stop()


def fetch(connection: BrokerConnection, *, timeout: float = 60.0) -> str:
    digest = hashlib.sha256()
    with connection.stream("GET", BLOB_PATH, timeout=timeout) as response:
        assert response.status == 200
        while data := response.read1(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def right() -> str:
    return hashlib.sha256(BLOB).hexdigest()


@pytest.mark.parametrize(("broker", "protocol"), KINDS)
def test_a_whole_exchange_through_the_broker(tmp_path: Path, broker: str, protocol: str) -> None:
    station = Station(tmp_path, broker)
    station.start()
    try:
        with broker_device(station, "van-1", protocol=protocol) as device:
            assert protocol in ("auto", device.session.protocol)
            found = welcome(device.connection)
            assert (found.name, found.mqtt and found.mqtt["port"]) == ("van-1", station.port)
            client = FleetClient(device.connection)
            client.activate(found.node_id)
            arrays = {"weight": np.random.default_rng(0).normal(size=(1 << 20)).astype(np.float32)}
            assert client.receive(0) is None
            with_one_message(station.superlink, client, arrays)
            assert (device.tunnel.handshakes, station.superlink.tunnel.handshakes) == (1, 1)
            assert client.bulk
            shown = MetricsService(station.superlink, station.field).text()
            assert "tunnel_sessions 1" in shown
            assert "tunnel_handshakes_total 1" in shown
    finally:
        station.stop()


def with_one_message(superlink: SuperLink, client: FleetClient, arrays: dict[str, np.ndarray]) -> None:
    grid = superlink.grid()
    message = grid.create_message(request(1, arrays).to_record(), MessageType.TRAIN, client.node.node_id, "train-1")
    (message_id,) = grid.push_messages([message])
    instruction = client.receive(30)
    assert instruction is not None
    client.push(answer(instruction))
    assert grid.wait_ready({message_id}, 30) == {message_id}
    (reply,) = grid.pull_messages([message_id])
    read = Reply.from_record(reply.content, origin="van-1")
    np.testing.assert_array_equal(read.arrays["weight"], arrays["weight"] + 1)


def test_a_cut_link_goes_on_where_it_stopped(plain: Station) -> None:
    with proxy_before(plain.port) as proxy, broker_device(plain, "van-2", port=proxy.port, protocol="311") as device:
        welcome(device.connection)
        proxy.cut_after = len(BLOB) // 2
        assert fetch(device.connection) == right()
        assert proxy.cut_after is None
        assert proxy.connections > 1
        # a window's worth may have been on its way when the link broke; nothing begins again
        assert proxy.bytes_down < len(BLOB) * 4 / 3
        assert device.tunnel.handshakes == 1


@needs_mosquitto
def test_a_broker_that_is_killed_and_comes_back_costs_nothing(tmp_path: Path) -> None:
    station = Station(tmp_path, "mosquitto")
    station.start()
    add_blob(station)
    try:
        with broker_device(station, "van-1") as device:
            digest, size = hashlib.sha256(), 0
            with device.connection.stream("GET", BLOB_PATH, timeout=60.0) as response:
                while data := response.read1(1 << 20):
                    digest.update(data)
                    size += len(data)
                    if size > 1 << 20 and device.tunnel.handshakes == 1 and station.broker is not None:
                        station.stop_broker(signal.SIGKILL)
                        eventually(lambda: not device.session.connected, 30)
                        threading.Thread(target=station.start_broker).start()
                        device.tunnel.handshakes += 1
            assert digest.hexdigest() == right()
            assert device.tunnel.handshakes == 2  # one, and our own mark
    finally:
        station.stop()


def test_a_restarted_server_is_met_with_a_new_handshake(tmp_path: Path) -> None:
    station = Station(tmp_path, "embedded")
    station.start()
    try:
        with broker_device(station, "van-1") as device:
            welcome(device.connection)
            station.stop_server()
            with pytest.raises(Unreachable):
                device.connection.request("POST", "/fieldfleet/v1/welcome", limit=1 << 20, timeout=0.5)
            station.start()
            assert eventually(lambda: _welcomed(device), 60)
            assert device.tunnel.handshakes == 2
    finally:
        station.stop()


def _welcomed(device: BrokerDevice) -> bool:
    try:
        return welcome(device.connection).name == "van-1"
    except Unreachable:
        return False


def test_a_revoked_device_is_refused_at_its_next_request(plain: Station) -> None:
    with broker_device(plain, "van-3") as device:
        welcome(device.connection)
        plain.superlink.registry.revoke("van-3")
        with pytest.raises(Unregistered, match="revoked"):
            welcome(device.connection)
        plain.superlink.fleet_watch.look()  # as the command does that revokes
        sessions = plain.superlink.tunnel.sessions
        eventually(lambda: "van-3" not in sessions, 60)
        assert eventually(lambda: _refused(device), 60)  # what it asked in the old session was nobody's any more
        assert device.tunnel.handshakes == 2


def _refused(device: BrokerDevice) -> bool:
    try:
        welcome(device.connection)
    except Unreachable:
        return False
    except Unregistered as error:
        return "revoked" in error.message
    return False


def test_a_request_after_a_long_quiet_time_needs_no_new_session(
    plain: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broker_device(plain, "van-11") as device:
        welcome(device.connection)
        eventually(lambda: device.tunnel.quiet, 30)
        monkeypatch.setattr(device.tunnel, "_heard_at", -1e9)
        for _ in range(3):
            welcome(device.connection)
        assert device.tunnel.handshakes == 1


def test_another_key_and_another_name_are_refused(plain: Station, tmp_path: Path) -> None:
    """The broker's account alone is worth nothing, and neither is the key of another device."""
    plain.register("van-5", other := new_key(tmp_path))
    with broker_device(plain, "van-4") as device:
        for key, reason in (
            (keys.create_device_key(tmp_path / "new.key"), "not registered"),
            (other, "another device"),
        ):
            device.tunnel.close()
            device.tunnel.__init__(key, plain.home.ca_file)  # type: ignore[misc]
            device.tunnel.attach(device.session, "test", "van-4")
            with pytest.raises(Unregistered, match=reason):
                welcome(device.connection)


class Hostile:
    """One kind of attack on each message of tunnels, a part of the time."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.random = kind, random.Random(seed)
        self.seen: list[bytes] = []
        self.done = 0

    def __call__(self, topic: str, payload: bytes) -> list[bytes]:
        if not topic.endswith((f"/{topics.UP}", f"/{topics.DOWN}")):
            return [payload]
        self.seen = [*self.seen[-50:], payload]
        if self.random.random() > 0.25:
            return [payload]
        self.done += 1
        changed = bytearray(payload)
        changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return {
            "flip": [bytes(changed)],
            "flip and pass": [bytes(changed), payload],
            "drop": [],
            "replay": [payload, self.random.choice(self.seen), payload],
            "swap": [self.random.choice(self.seen)],  # also of the other direction
            "invent": [payload, self.random.randbytes(self.random.randrange(2_000))],
        }[self.kind]


@pytest.mark.parametrize("kind", ["flip", "flip and pass", "drop", "replay", "swap", "invent"])
def test_a_hostile_broker_changes_nothing_and_honest_traffic_recovers(
    plain: Station, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("fl_core.link.tunnel.channel", "fl_clients.tunnel"):  # waiting less, so that the test is short
        monkeypatch.setattr(f"{module}.FIRST_WAIT_S", 0.1)
        monkeypatch.setattr(f"{module}.LONGEST_WAIT_S", 0.3)
    with proxy_before(plain.port) as proxy, broker_device(plain, "van-6", port=proxy.port, protocol="311") as device:
        hostile = Hostile(kind, 1)
        proxy.tamper = hostile
        failures = 0
        while hostile.done < 15:
            try:
                assert fetch_part(device.connection) == BLOB[: 1 << 18]
            except Unreachable:
                failures += 1
        proxy.tamper = honest
        assert eventually(lambda: _recovered(device), 90), f"{failures} failures before"


def fetch_part(connection: BrokerConnection) -> bytes:
    headers = {"range": f"bytes=0-{(1 << 18) - 1}"}
    answered = connection.request("GET", BLOB_PATH, limit=1 << 20, timeout=2.0, headers=headers)
    assert answered.status == 206
    return answered.body


def _recovered(device: BrokerDevice) -> bool:
    try:
        return fetch(device.connection, timeout=10.0) == right()
    except Unreachable:
        return False


def test_where_https_does_not_get_through_the_broker_does(plain: Station) -> None:
    with broker_device(plain, "van-8") as device, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        url = f"https://127.0.0.1:{closed.getsockname()[1]}"
        now = [0.0]
        direct = ServerConnection(url, plain.home.ca_file, device.key)
        connection = AutoConnection(direct, device.connection, device.tunnel, clock=lambda: now[0])
        assert connection.url == url
        assert welcome(connection).name == "van-8"
        assert connection.url == device.connection.url
        assert welcome(connection).name == "van-8"
        now[0] = 10_000.0
        assert connection.url == url  # after a while HTTPS has its chance again
        connection.close()
        working = ServerConnection(plain.superlink.url, plain.home.ca_file, device.key)
        connection = AutoConnection(working, device.connection, device.tunnel)
        assert welcome(connection).name == "van-8"
        assert connection.url == plain.superlink.url
        connection.close()


def test_the_updater_reads_the_repository_through_a_door_on_this_machine(plain: Station) -> None:
    with (
        broker_device(plain, "van-9") as device,
        repository_at(device.connection, "/fieldfleet/v1/repository/") as url,
    ):
        assert url.startswith("http://127.0.0.1:")
        place = urllib.parse.urlsplit(url)
        http = HTTPConnection(place.netloc, timeout=60)
        for start in (0, len(BLOB) - 5):
            http.request("GET", f"{place.path}/targets/blob.bin", headers={"Range": f"bytes={start}-"} if start else {})
            answered = http.getresponse()
            assert answered.status == (206 if start else 200)
            assert answered.read() == BLOB[start:]
        for wrong, status in ((f"{place.path}/targets/none", 404), ("/targets/blob.bin", 404)):
            http.request("GET", wrong)
            answered = http.getresponse()
            answered.read()
            assert answered.status == status
        http.close()


def test_a_command_without_an_agent_brings_its_own_connection(plain: Station, tmp_path: Path) -> None:
    home = AgentHome(tmp_path / "agent")
    key = keys.create_device_key(home.key_file)
    plain.register("van-10", key)
    write_account(home.account_file, device_account(plain.home, plain.superlink.registry, "van-10"))
    home.ca_file.write_bytes(plain.home.ca_file.read_bytes())
    home.settings_file.write_text(settings_text(url="", name="van-10", applications=[], transport="mqtt"))
    connection = open_transport(home, home.settings(), key)
    assert welcome(connection).name == "van-10"
    connection.close()
    assert welcome(connection).name == "van-10"  # opens again
    rotate_key(home, connection)
    connection.close()
    connection = open_transport(home, home.settings(), keys.load_private_key(home.key_file))
    assert welcome(connection).name == "van-10"
    connection.close()
    connection = open_transport(home, home.settings(), key)
    with pytest.raises(Unregistered, match="replaced"):
        welcome(connection)
    connection.close()


def test_the_embedded_brokers_short_cut_keeps_its_rules() -> None:
    """What a device may not publish does not reach the tunnel; who is not there is no reason to wait."""
    taken: list[Message] = []

    def tap(message: Message) -> bool:
        taken.append(message)
        return topics.UP in message.topic

    broker, settled = embedded(), threading.Event()
    carrier = broker.carry(tap)
    assert not carrier.connected
    down = Outgoing(topic=device_topic("van-1", topics.DOWN), payload=b"down")
    assert carrier.publish(down) is None
    with broker, session("van-1", broker.port, [down.topic]) as device:
        assert device.wait_connected(30), device.failure
        assert device.deliver(Outgoing(topic=device_topic("van-2", topics.UP), payload=b"of another"), 30)
        assert device.deliver(Outgoing(topic=device_topic("van-1", topics.UP), payload=b"own"), 30)
        assert [m.payload for m in taken] == [b"own"]
        assert carrier.publish(down, lambda ok: settled.set())
        received = device.receive(30)
        assert received is not None
        assert received.payload == b"down"
        assert settled.wait(30)
        settled.clear()
        absent = Outgoing(topic=device_topic("van-2", topics.DOWN), payload=b"down")
        assert carrier.publish(absent, lambda ok: settled.set())
        assert settled.wait(30)
    assert not carrier.connected
