"""What goes wrong on a device's MQTT link: crashes in mid-job, a server that comes back, a damaged store, no broker at all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_core.link.outbox import DeviceStore
from tests.bundles import TOY
from tests.field import NAME, Field
from tests.helpers import eventually, fieldfleet


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    found = Field(tmp_path)
    found.register()
    yield found
    found.stop()


def test_a_job_cut_off_by_kill_9_is_run_at_the_next_start(field: Field) -> None:
    field.publish(0)
    with field.running("--no-train") as process:
        eventually(lambda: field.device()["state"].get("inference"), 60)
        job = field.bridge.command(NAME, "infer")
        process.send_signal(signal.SIGKILL)
        process.wait()
    eventually(lambda: not field.device()["alive"])
    later = field.bridge.command(NAME, "ping")  # asked while the device is away
    with field.running("--no-train"):
        for waiting in (job, later):
            reply = field.bridge.wait_reply(waiting, 60)
            assert reply is not None, field.log()
            assert reply["ok"] is True
    assert not list(field.predictions.glob(".*")), "no half-written file"


def test_the_agent_outlives_its_server_and_tells_what_it_did_meanwhile(field: Field) -> None:
    field.publish(0)
    intervals = field.agent / "agent.toml"
    text = intervals.read_text()
    intervals.write_text(text.replace("infer_s = 0.0 ", "infer_s = 1.0 "))
    with field.running("--no-train") as process:
        eventually(lambda: field.bridge.table.reports(NAME, "inference"), 60)
        field.stop()
        made = len(list(field.predictions.glob("*.csv")))
        eventually(lambda: len(list(field.predictions.glob("*.csv"))) >= made + 2, 30)
        assert process.poll() is None
        field.start()
        assert field.bridge.wait_alive([NAME], 60), field.log()
        before = made
        eventually(lambda: len(field.bridge.table.reports(NAME, "inference")) >= before + 2, 30)
        assert field.ask("ping")["ok"] is True
        process.terminate()
        assert process.wait(20) == 0
    store = DeviceStore(field.agent / "outbox.db")
    assert store.depth() == (0, 0)
    store.close()


def test_a_damaged_store_is_named_without_a_traceback(field: Field) -> None:
    (field.agent / "outbox.db").write_bytes(b"damaged" * 1000)
    done = fieldfleet("agent", "run", field.agent, "--once")
    assert done.returncode == 3
    assert "outbox.db" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fleet_without_mqtt_updates_and_infers(tmp_path: Path) -> None:
    field = Field(tmp_path, mqtt="off")
    try:
        field.register()
        field.publish(0)
        with field.running("--no-train", alive=False) as process:
            eventually(lambda: list(field.predictions.glob("*.csv")), 60)
            told = eventually(lambda: [d for d in field.superlink.devices.devices() if d["name"] == NAME], 60)
            assert TOY in told[0]["state"]["capabilities"]["applications"], "by a request"
            (report,) = eventually(lambda: field.superlink.telemetry.read(device=NAME, kind="inference"), 60)
            assert report.body["num_examples"] > 0, "by a request, too"
            process.terminate()
            assert process.wait(20) == 0
        store = DeviceStore(field.agent / "outbox.db")
        assert store.depth() == (0, 0), "nothing is kept for a broker that does not exist"
        store.close()
    finally:
        field.stop()
