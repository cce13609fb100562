"""The device table's rules, and the bridge over real brokers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.errors import EnvironmentFault, InputError, RefusedError
from fl_core.link import topics
from fl_core.link.envelope import Envelope, decode, encode
from fl_core.link.session import MqttSession, Outgoing
from fl_server.bridge import Bridge, ask
from fl_server.device_table import DeviceTable, Job
from tests.helpers import eventually
from tests.mqtt_helpers import BROKERS, FLEET, address, device_topic, running_broker, session, state_of


def message(kind: str, boot: int, connection: int, **body: Any) -> Envelope:
    return Envelope(type=kind, boot=boot, connection=connection, body=body)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[DeviceTable]:
    found = DeviceTable(tmp_path / "d.db")
    yield found
    found.close()


def test_births_deaths_and_late_wills(table: DeviceTable) -> None:
    assert table.note_state("v", message("birth", 5, 1, model=1))
    assert table.note_state("v", message("birth", 5, 2, model=1))
    assert not table.note_state("v", message("death", 5, 1)), "the will of the connection before"
    assert table.note_state("v", message("state", 5, 2, model=2))
    assert table.note_state("v", message("death", 5, 2))
    assert not table.note_state("v", message("state", 5, 2, model=3)), "that connection has ended"
    (device,) = table.devices()
    assert (device["alive"], device["state"]) == (False, {"model": 2})
    assert table.note_state("v", message("birth", 1, 1, model=9)), "set up anew: it counts from 1 again"
    table.forget_alive()
    assert not table.devices()[0]["alive"]
    assert table.note_state("v", message("birth", 1, 1, model=9)), "retained, after the bridge came back"
    assert table.devices()[0]["alive"]


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(["birth", "state", "death"]), st.integers(1, 3), st.integers(1, 3)), max_size=12)
)
def test_alive_means_that_the_newest_connection_has_not_ended(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, int]]
) -> None:
    table = DeviceTable(tmp_path_factory.mktemp("t") / "d.db")
    known: tuple[int, int] | None = None
    alive = False
    for kind, boot, connection in events:
        order = (boot, connection)
        counts = known is None or kind == "birth" or order >= known
        if known == order and not alive and kind != "death":
            counts = False
        assert table.note_state("v", message(kind, boot, connection)) is counts
        if counts:
            known, alive = order, kind != "death"
    assert [d["alive"] for d in table.devices()] == ([alive] if events else [])
    table.close()


def test_old_states_repeated_do_not_count_and_a_device_set_up_anew_does(table: DeviceTable) -> None:
    def said(kind: str, boot: int, number: int, at: float) -> bool:
        found = Envelope(type=kind, boot=boot, connection=1, time=at, unknown={"number": number})
        return table.next_in_place("v", found)

    assert said("birth", 3, 1, 100.0)
    assert said("state", 3, 2, 101.0)
    assert said("state", 3, 2, 101.0), "kept by a broker, and heard again"
    assert not said("birth", 3, 1, 100.0), "repeated by somebody"
    assert not said("state", 2, 9, 200.0)
    assert said("birth", 1, 1, 300.0), "set up anew: it counts from 1"
    assert said("death", 1, 2**53 - 1, 300.0)
    assert not said("state", 1, 3, 301.0), "its connection has ended"


def test_a_reply_counts_once_and_only_from_its_device(table: DeviceTable) -> None:
    table.add_job(Job("j", "v", "ping", {}, None), valid_s=60)
    assert [job.id for job in table.open_jobs("v")] == ["j"]
    assert not table.note_reply("w", Envelope(type="ping", id="j", body={"ok": True}))
    assert table.note_reply("v", Envelope(type="ping", id="j", body={"ok": True}))
    assert not table.note_reply("v", Envelope(type="ping", id="j", body={"ok": False}))
    job = table.job("j")
    assert job is not None
    assert job.reply == {"ok": True}
    assert table.open_jobs("v") == []
    table.add_job(Job("old", "v", "ping", {}, None), valid_s=-1)
    assert table.open_jobs("v") == []


def test_reports_are_kept_once_each_and_bounded(table: DeviceTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.telemetry, "_max_per_device", 3)
    table.note_state("v", message("birth", 1, 1))
    first = Envelope(type="inference", id="r0", body={"n": 0})
    assert table.note_report("v", first)
    assert not table.note_report("v", first)
    for number in range(1, 6):
        table.note_report("v", Envelope(type="inference", id=f"r{number}", body={"n": number}))
    assert [r["n"] for r in table.reports("v", "inference")] == [5, 4, 3]
    assert table.devices()[0]["telemetry"]["n"] == 5
    assert table.reports("v", "telemetry") == []


@contextmanager
def bridge(folder: Path, port: int, **options: Any) -> Iterator[Bridge]:
    found = Bridge(folder, FLEET, address(topics.SERVER_ACCOUNT, port), **options)
    found.start()
    try:
        yield found
    finally:
        found.stop()


@contextmanager
def device(port: int, boot: int = 1) -> Iterator[MqttSession]:
    with session(
        "van-1",
        port,
        [device_topic("van-1", topics.COMMAND)],
        greeting=state_of("van-1", "birth", boot),
        will=state_of("van-1", "death", boot),
    ) as opened:
        assert opened.wait_connected(10)
        yield opened


def received(opened: MqttSession) -> Envelope:
    found = opened.receive(10)
    assert found is not None
    return decode(found.payload, origin=found.topic)


def answer(opened: MqttSession, command: Envelope, **body: Any) -> None:
    content = Envelope(type=command.type, id=command.id, body={"ok": True, **body})
    assert opened.deliver(Outgoing(topic=device_topic("van-1", topics.REPLY), payload=encode(content)), 10)


@pytest.mark.parametrize("kind", BROKERS)
def test_commands_wakes_reports_and_an_open_job_after_a_restart(kind: str, tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    with running_broker(kind, tmp_path / "broker") as broker:
        with bridge(tmp_path, broker.port, on_event=lambda e, d, f: events.append((e, d))) as first:
            with device(broker.port) as van:
                assert first.wait_alive(["van-1"], 10)
                job = first.command("van-1", "infer", {"limit": 5})
                command = received(van)
                assert (command.type, command.id, command.body) == ("infer", job, {"limit": 5})
                answer(van, command, n=7)
                assert first.wait_reply(job, 10) == {"ok": True, "n": 7}
                first.wake(["van-1"])
                assert received(van).type == "wake"
                report = encode(Envelope(type="inference", body={"count": 3}))
                van.deliver(Outgoing(topic=device_topic("van-1", topics.TELEMETRY), payload=report), 10)
                eventually(lambda: first.table.reports("van-1"))
                for bad in (b"{", b"", b"x" * 1000):  # a broken device stops nobody
                    van.deliver(Outgoing(topic=device_topic("van-1", topics.TELEMETRY), payload=bad), 10)
                assert first.wait_reply("no-such-job", 0.05) is None
            with pytest.raises(InputError, match="unknown command"):
                first.command("van-1", "reboot")
            waiting = first.command("van-1", "update")
        assert {("birth", "van-1"), ("reply", "van-1"), ("inference", "van-1")} <= set(events)
        with bridge(tmp_path, broker.port) as second, device(broker.port, boot=2) as van:
            command = received(van)
            assert (command.type, command.id) == ("update", waiting)
            answer(van, command)
            assert second.wait_reply(waiting, 10) == {"ok": True}


def test_an_operator_asks_without_a_bridge(tmp_path: Path) -> None:
    with running_broker("embedded", tmp_path) as broker, device(broker.port) as van:
        operator = address(topics.OPERATOR_ACCOUNT, broker.port, client_id="_operator-1")
        with pytest.raises(RefusedError, match="did not answer 'ping'") as caught:
            ask(operator, FLEET, "van-1", "ping", {}, timeout=0.5)
        assert caught.value.exit_code == 4
        assert received(van).type == "ping"
        with pytest.raises(InputError, match="unknown command"):
            ask(operator, FLEET, "van-1", "reboot", {}, timeout=1)


def test_a_broker_that_refuses_the_server_is_an_environment_fault(tmp_path: Path) -> None:
    with running_broker("embedded", tmp_path / "b") as broker:
        refused = Bridge(tmp_path, FLEET, address(topics.SERVER_ACCOUNT, broker.port, password="wrong"))
        with pytest.raises(EnvironmentFault, match="refused"):
            refused.start(timeout=1.0)
        refused.stop()
