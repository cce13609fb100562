"""MqttSession against the real brokers: amqtt as embedded and mosquitto, MQTT 3.1.1 and 5."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.errors import EnvironmentFault, IntegrityError
from fl_core.link import topics
from fl_core.link.envelope import SIZE_LIMIT
from fl_core.link.outbox import DeviceStore
from fl_core.link.session import PACKET_LIMIT, MqttSession, Outgoing
from tests.helpers import ROOT, eventually
from tests.mqtt_helpers import (
    BROKERS,
    Mosquitto,
    address,
    device_topic,
    embedded,
    needs_mosquitto,
    next_envelope,
    running_broker,
    session,
    state_of,
    watcher,
)

PROTOCOLS = [
    ("embedded", "auto", "311"),
    ("embedded", "311", "311"),
    pytest.param("mosquitto", "auto", "5", marks=needs_mosquitto),
    pytest.param("mosquitto", "5", "5", marks=needs_mosquitto),
    pytest.param("mosquitto", "311", "311", marks=needs_mosquitto),
]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with running_broker(request.param, tmp_path / "broker") as found:
        yield found


@pytest.mark.parametrize(("kind", "protocol", "spoken"), PROTOCOLS)
def test_birth_command_and_farewell(kind: str, protocol: str, spoken: str, tmp_path: Path) -> None:
    with (
        running_broker(kind, tmp_path / "broker") as broker,
        watcher(broker.port, changes={"protocol": protocol}) as server,
    ):
        device = MqttSession(
            address("van-1", broker.port, protocol=protocol),
            subscriptions=[device_topic("van-1", topics.COMMAND)],
            greeting=state_of("van-1", "birth", boot=7),
            will=state_of("van-1", "death", boot=7),
        )
        device.start()
        assert device.wait_connected(10), device.failure
        assert device.protocol == server.protocol == spoken
        topic, birth = next_envelope(server)
        assert (topic, birth.type, birth.boot) == (device_topic("van-1", "state"), "birth", 7)
        command = Outgoing(topic=device_topic("van-1", topics.COMMAND), payload=b"x", expiry_s=60)
        assert server.deliver(command, 10)
        message = device.receive(10)
        assert message is not None
        assert message.payload == b"x"
        device.stop(state_of("van-1", "stopped", boot=7)(device.connection))
        assert next_envelope(server)[1].type == "stopped"  # and no will
        # the state is retained for whoever comes later
        with session(topics.OPERATOR_ACCOUNT, broker.port, [topics.every_device("fleet-1", topics.STATE)]) as late:
            message = late.receive(10)
            assert message is not None
            assert message.retained
            assert b'"stopped"' in message.payload


CHILD = """
import sys
from fl_core.link.session import MqttSession
from tests.mqtt_helpers import address, state_of
s = MqttSession(address("van-1", int(sys.argv[1])), greeting=state_of("van-1", "birth"), will=state_of("van-1", "death"))
s.start()
assert s.wait_connected(10)
sys.stdin.read()
"""


def test_kill_9_makes_the_broker_send_the_will(broker: Any) -> None:
    with watcher(broker.port) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(broker.port)], stdin=subprocess.PIPE, cwd=ROOT)
        birth = next_envelope(server, 20)[1]
        os.kill(child.pid, signal.SIGKILL)
        death = next_envelope(server)[1]
        assert (birth.type, death.type) == ("birth", "death")
        assert birth.order == death.order
        child.communicate()


def test_a_wrong_password_is_refused_and_said(broker: Any) -> None:
    with session("van-1", broker.port, changes={"password": "wrong"}) as device:
        failure = eventually(lambda: device.failure)
        assert "refused" in failure
        assert not device.connected
        assert device.publish(Outgoing(topic=device_topic("van-1", "state"), payload=b"x")) is None


def test_without_a_password_nobody_gets_in(broker: Any) -> None:
    with session("", broker.port, changes={"password": "", "client_id": "x"}) as stranger:
        assert "refused" in eventually(lambda: stranger.failure)


def test_a_device_reaches_no_other_devices_topics(broker: Any) -> None:
    own = device_topic("van-1", topics.TELEMETRY)
    with watcher(broker.port) as server, session("van-1", broker.port) as device:
        assert device.wait_connected(10)
        for foreign in (device_topic("van-2", topics.TELEMETRY), device_topic("van-1", topics.COMMAND), "elsewhere"):
            device.deliver(Outgoing(topic=foreign, payload=b"intruder", retain=True), 5)
        device.deliver(Outgoing(topic=own, payload=b"own"), 5)
        message = server.receive(10)
        assert message is not None
        assert (message.topic, message.payload) == (own, b"own")
    spied = device_topic("van-2", topics.COMMAND)
    with session("van-1", broker.port, [spied]) as spy, session(topics.SERVER_ACCOUNT, broker.port) as server:
        assert server.wait_connected(10)
        eventually(lambda: spy.connected or spy.failure)  # a broker may grant what it then never delivers
        server.deliver(Outgoing(topic=spied, payload=b"secret"), 5)
        assert spy.receive(0.3) is None


@pytest.mark.parametrize("kind", BROKERS)
def test_after_a_broker_restart_subscriptions_stand_and_the_outbox_is_flushed(kind: str, tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "o.db")
    command, reply = device_topic("van-1", topics.COMMAND), device_topic("van-1", topics.REPLY)
    with (
        running_broker(kind, tmp_path / "broker") as broker,
        watcher(broker.port, changes={"session_expiry_s": 600}) as server,
        session("van-1", broker.port, [command], store=store) as device,
    ):
        assert device.wait_connected(10)
        broker.stop()
        eventually(lambda: not device.connected and not server.connected)
        for number in range(40):
            store.put(reply, b"%d" % number)
        restarted: Any = embedded(broker.port, admit_devices=False)
        if kind == "mosquitto":  # it has kept the server's session
            restarted = Mosquitto(tmp_path / "broker", port=broker.port)
        restarted.start()
        try:
            assert server.wait_connected(10)
            if kind == "embedded":
                restarted.admit()
            assert [m.payload for _ in range(40) if (m := server.receive(10))] == [b"%d" % n for n in range(40)]
            eventually(lambda: store.depth() == (0, 0))
            assert device.wait_connected(10)
            assert server.deliver(Outgoing(topic=command, payload=b"hello"), 10)
            message = device.receive(10)
            assert message is not None
            assert message.payload == b"hello"
        finally:
            restarted.stop()
    store.close()


def test_the_outbox_survives_a_restart_of_the_device_in_order(broker: Any, tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "o.db")
    for number in range(60):
        store.put(device_topic("van-1", topics.REPLY), b"%d" % number)
    store.close()
    store = DeviceStore(tmp_path / "o.db")
    with watcher(broker.port) as server, session("van-1", broker.port, store=store) as device:
        assert [m.payload for _ in range(60) if (m := server.receive(10))] == [b"%d" % n for n in range(60)]
        eventually(lambda: store.depth() == (0, 0))
        assert device.connected
    store.close()


def test_a_message_over_the_limit_is_refused_here_and_dropped_from_the_outbox(broker: Any, tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "o.db")
    with watcher(broker.port) as server, session("van-1", broker.port, store=store) as device:
        assert device.wait_connected(10)
        with pytest.raises(IntegrityError, match="over the broker's"):
            device.publish(Outgoing(topic=device_topic("van-1", topics.REPLY), payload=b"x" * PACKET_LIMIT))
        store.put(device_topic("van-1", topics.REPLY), b"x" * PACKET_LIMIT)
        store.put(device_topic("van-1", topics.REPLY), b"y" * SIZE_LIMIT)
        message = server.receive(10)
        assert message is not None
        assert message.payload == b"y" * SIZE_LIMIT
        eventually(lambda: store.depth() == (0, 0))
    store.close()


def test_a_ring_ends_waiting(broker: Any) -> None:
    with session("van-1", broker.port) as device:
        device.ring()
        assert device.receive(60) is None


def test_an_authority_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(EnvironmentFault, match=r"ca\.pem"):
        MqttSession(address("van-1", 1, ca=tmp_path / "ca.pem"))


def test_nobody_listens(tmp_path: Path) -> None:
    with session("van-1", 1) as device:
        assert "127.0.0.1:1" in eventually(lambda: device.failure)
