"""The embedded broker facing a network: what amqtt leaves open and GuardedBroker closes. Also its contract test."""

from __future__ import annotations

import inspect
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from amqtt.broker import Broker
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler

from fl_core.contracts.errors import EnvironmentFault
from fl_core.identity import ca
from fl_core.link import topics
from fl_core.link.session import Outgoing
from fl_server.broker import EmbeddedBroker
from fl_server.mqtt_adapter import GuardedBroker, Handler
from tests.helpers import eventually
from tests.mqtt_helpers import PASSWORDS, address, device_topic, embedded, next_envelope, session, state_of, watcher


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with embedded() as found:
        yield found


def text(value: str) -> bytes:
    return struct.pack("!H", len(value)) + value.encode()


def connect_packet(name: str, password: str, *, client_id: str = "", will: str = "", keepalive: int = 60) -> bytes:
    """A 3.1.1 CONNECT by hand, with a clean session."""
    flags = 0b1100_0010 | (0b0000_0100 if will else 0)
    body = text("MQTT") + bytes([4, flags]) + struct.pack("!H", keepalive) + text(client_id or name)
    body += (text(will) + text("gone") if will else b"") + text(name) + text(password)
    return b"\x10" + bytes([len(body)]) + body


def raw(broker: EmbeddedBroker, data: bytes, *, keep: bool = False) -> tuple[bytes, socket.socket]:
    """(the first four bytes of the answer, the connection)."""
    connection = socket.create_connection(("127.0.0.1", broker.port), timeout=10)
    connection.sendall(data)
    try:
        answer = connection.recv(4)
    except ConnectionResetError:
        answer = b""
    if not keep:
        connection.close()
    return answer, connection


ACCEPTED, REFUSED, OTHER_VERSION = b"\x20\x02\x00\x00", b"\x20\x02\x00\x05", b"\x20\x02\x00\x01"


def test_the_private_names_that_the_adapter_overrides_are_where_they_were() -> None:
    for name in (
        "_initialize_client_session",
        "_authenticate",
        "_topic_filtering",
        "_publish_retained_messages_for_subscription",
        "_client_connected",
        "_del_all_subscriptions",
        "stream_connected",
    ):
        ours, theirs = getattr(GuardedBroker, name), getattr(Broker, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters) or name in (
            "_authenticate",  # amqtt calls the listener "_"
        )
    for name in ("handle_publish", "handle_puback", "handle_read_timeout", "_send_packet", "mqtt_publish"):
        ours, theirs = getattr(Handler, name), getattr(BrokerProtocolHandler, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (connect_packet("van-1", "first"), ACCEPTED),
        (connect_packet("van-1", "second"), REFUSED),
        (connect_packet("van-9", "first"), REFUSED),
        (connect_packet("van-1", "first", client_id="van-2"), REFUSED),
        (connect_packet("van-1", "first", client_id="_server"), REFUSED),
        (connect_packet("_server", "server", client_id="_server-7"), ACCEPTED),
        (connect_packet("van-1", "first", will=device_topic("van-1", "state")), ACCEPTED),
        (connect_packet("van-1", "first", will=device_topic("van-2", "state")), REFUSED),
        (connect_packet("van-1", "first", will=device_topic("van-1", "command")), REFUSED),
        (connect_packet("van-1", "first").replace(b"MQTT\x04", b"MQTT\x05"), OTHER_VERSION),
        (connect_packet("van-1", "first").replace(b"MQTT", b"HTTP"), b""),
        (b"GET / HTTP/1.1\r\n\r\n" + b"x" * 80, b""),
        (b"\x10\xff\xff\xff\x7f" + b"x" * 100, b""),
        (b"\x30\x05" + text("abc"), b""),
        (b"\x10\x03abc", b""),
        (b"\x10\x10" + text("MQTT") + b"\x04" + b"\xff" * 9, b""),
    ],
)
def test_each_first_packet_gets_its_answer(broker: EmbeddedBroker, packet: bytes, answer: bytes) -> None:
    assert raw(broker, packet)[0] == answer
    assert raw(broker, connect_packet("van-2", "second"))[0] == ACCEPTED, "the broker lives on"


def test_a_stranger_cannot_disturb_a_session_that_stands(broker: EmbeddedBroker) -> None:
    """amqtt deletes the session of the client id in a CONNECT before it looks at the password."""
    command = device_topic("van-1", topics.COMMAND)
    with watcher(broker.port) as server, session("van-1", broker.port, [command]) as device:
        assert device.wait_connected(10)
        for name, password in (("van-1", "wrong"), ("van-2", PASSWORDS["van-2"])):
            assert raw(broker, connect_packet(name, password, client_id="van-1"))[0] == REFUSED
        assert server.deliver(Outgoing(topic=command, payload=b"still there"), 10)
        message = device.receive(10)
        assert message is not None
        assert message.payload == b"still there"
        assert device.connection <= 2  # the refused MQTT 5 and this one


def test_a_second_connection_of_a_device_ends_the_first_and_its_will_comes_first(broker: EmbeddedBroker) -> None:
    with watcher(broker.port) as server:
        will = device_topic("van-1", topics.STATE)
        answer, first = raw(broker, connect_packet("van-1", "first", will=will), keep=True)
        assert answer == ACCEPTED
        with session("van-1", broker.port, greeting=state_of("van-1", "birth")) as device, closing(first):
            assert device.wait_connected(10)
            message = server.receive(10)
            assert message is not None
            assert message.payload == b"gone"
            assert next_envelope(server)[1].type == "birth"
            assert first.recv(1) == b""


def test_a_silent_connection_is_a_death_after_one_and_a_half_keep_alives(broker: EmbeddedBroker) -> None:
    with watcher(broker.port) as server:
        packet = connect_packet("van-1", "first", will=device_topic("van-1", topics.STATE), keepalive=1)
        with closing(raw(broker, packet, keep=True)[1]):
            message = server.receive(10)
            assert message is not None
            assert message.payload == b"gone"


def test_a_device_gets_only_the_retained_messages_it_subscribed_to(broker: EmbeddedBroker) -> None:
    """amqtt sends each new client every retained message that any client is subscribed to."""
    with watcher(broker.port), session("van-1", broker.port, greeting=state_of("van-1", "birth")) as first:
        assert first.wait_connected(10)
        with session("van-2", broker.port, [device_topic("van-2", topics.COMMAND)]) as second:
            assert second.wait_connected(10)
            assert second.receive(0.3) is None


def test_a_packet_over_the_limit_ends_the_connection(broker: EmbeddedBroker) -> None:
    _, connection = raw(broker, connect_packet("van-1", "first"), keep=True)
    with closing(connection):
        connection.sendall(b"\x30\xff\xff\xff\x7f" + text(device_topic("van-1", topics.STATE)) + b"x" * 1000)
        assert eventually(lambda: _ended(connection))
    assert raw(broker, connect_packet("van-1", "first"))[0] == ACCEPTED


def _ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_quick_acknowledgement_stalls_nobody(broker: EmbeddedBroker) -> None:
    """amqtt waits 5 s for a PUBACK that came before it began to wait, with the subscriber's other packets behind it."""
    with session("van-1", broker.port, greeting=state_of("van-1", "birth")) as device:
        assert device.wait_connected(10)
        eventually(lambda: device.connected)
        for _ in range(20):
            with watcher(broker.port) as server:
                assert server.receive(10) is not None
                assert server.deliver(Outgoing(topic=device_topic("van-1", topics.COMMAND), payload=b"x"), 2)


def test_devices_wait_until_they_are_admitted() -> None:
    with embedded(admit_devices=False) as broker:
        assert raw(broker, connect_packet("van-1", "first"))[0] == REFUSED
        assert raw(broker, connect_packet("_server", "server"))[0] == ACCEPTED
        broker.admit()
        assert raw(broker, connect_packet("van-1", "first"))[0] == ACCEPTED


def test_a_busy_port_is_found_before_anything_starts(broker: EmbeddedBroker) -> None:
    with pytest.raises(EnvironmentFault, match=f"port {broker.port} .* is busy") as caught:
        embedded(broker.port).start()
    assert caught.value.exit_code == 3
    assert caught.value.remedy


def test_stop_frees_the_port_and_may_be_repeated() -> None:
    broker = embedded()
    broker.start()
    port = broker.port
    broker.stop()
    broker.stop()
    again = embedded(port)
    again.start()
    again.stop()


# paho leaves a socket whose handshake failed to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_with_the_homes_certificate(tmp_path: Path) -> None:
    ca.create_ca(tmp_path / "ca", "fleet-1")
    ca.issue_server_certificate(tmp_path / "ca", tmp_path / "tls", ["127.0.0.1"])
    certificate = (tmp_path / "tls" / ca.SERVER_NAME, tmp_path / "tls" / ca.SERVER_KEY_NAME)
    ca.create_ca(tmp_path / "other", "fleet-2")
    with embedded(certificate=certificate) as broker:
        with session("van-1", broker.port, changes={"ca": tmp_path / "ca" / ca.CA_NAME}) as device:
            assert device.wait_connected(10), device.failure
        with session("van-1", broker.port, changes={"ca": tmp_path / "other" / ca.CA_NAME}) as deceived:
            assert "certificate verify failed" in eventually(lambda: deceived.failure)
        with session("van-1", broker.port) as plain:
            assert eventually(lambda: plain.failure)
            assert not plain.connected
        context = ssl.create_default_context(cafile=str(tmp_path / "ca" / ca.CA_NAME))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", broker.port)) as plain_socket,
            context.wrap_socket(plain_socket, server_hostname="127.0.0.1") as tls,
        ):
            assert tls.version() == "TLSv1.2"


def test_addresses_hide_their_password() -> None:
    assert "first" not in repr(address("van-1", 1))
