"""The inbox: files that are settled, whole and right go into the store, others wait or are put aside with the reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_clients.edge.samples.index import Limits, prepare
from fl_clients.edge.samples.intake import Intake
from fl_clients.edge.samples.store import SampleStore
from fl_clients.edge.samples.topics import TopicSource, file_name
from fl_clients.edge.settings import SampleSettings
from fl_core.learning.application import application
from fl_core.learning.samples import npz_bytes
from tests.helpers import ROOT, eventually
from tests.mqtt_helpers import MOSQUITTO, free_port, needs_mosquitto

TOY = application("toy_regression")


def content(number: float) -> bytes:
    return npz_bytes({"x": np.array([number, 1.0], np.float32)})


@pytest.fixture
def intake(tmp_path: Path) -> Any:
    with SampleStore(tmp_path / "store", TOY) as store:
        yield Intake(store, tmp_path / "inbox", settle_s=0)


def state(intake: Intake) -> dict[str, Any]:
    return {entry.id: entry.label for entry in intake.store.index.entries(labelled=False)}


def test_files_messages_and_labels(intake: Intake) -> None:
    inbox = intake.inbox
    (inbox / "a.npz").write_bytes(content(1))
    (inbox / "b.json").write_text(json.dumps({"time": time.time() - 1000, "label": 2, "arrays": {"x": [2, 1]}}))
    (inbox / "c.json").write_text(json.dumps({"id": "sample-c", "arrays": {"x": [3, 1]}}))
    (inbox / "labels-1.csv").write_text("id,label\na,1.5\nlate,9\nc,wrong\n")
    (inbox / "labels-2.jsonl").write_text('{"id": "sample-c", "label": 3}\nnonsense\n{"id": 7, "label": 1}\n')
    (inbox / "z.json").write_text(json.dumps({"id": "b", "label": 20}))
    assert intake.poll() == (6, 0)
    assert intake.poll() == (0, 0)
    assert not list(inbox.iterdir())
    assert state(intake) == {"a": 1.5, "b": 20.0, "sample-c": 3.0}
    reasons = {row["name"]: row["reason"] for row in intake.store.index.quarantined()}
    assert set(reasons) == {"labels-1.csv:4", "labels-2.jsonl:2", "labels-2.jsonl:3"}
    assert "not a finite number" in reasons["labels-1.csv:4"]
    (inbox / "late.npz").write_bytes(content(4))
    intake.poll()
    assert state(intake)["late"] == 9.0, "the label came before its sample"


def test_what_is_damaged_is_put_aside_with_its_reason_and_counted(intake: Intake, tmp_path: Path) -> None:
    inbox, secret = intake.inbox, tmp_path / "secret.npz"
    secret.write_bytes(content(5))
    bad = {
        "cut.npz": content(1)[:-30],
        "nan.npz": content(float("nan")),
        "pickle.npz": _pickled(),
        "what.xyz": b"?",
        "no id!.npz": content(1),
        "deep.json": b'{"arrays": ' + b"[" * 100_000,
        "ragged.json": b'{"arrays": {"x": [[1], [1, 2]]}}',
        "none.json": b"{}",
        "labels.csv": b"name,label\na,1\n",
        "labels2.csv": b"id,label\n\xff\xfe,1\n",
    }
    for name, data in bad.items():
        (inbox / name).write_bytes(data)
    (inbox / "link.npz").symlink_to(secret)
    (inbox / "good.npz").write_bytes(content(7))
    assert intake.poll() == (len(bad) + 2, 0)
    assert list(state(intake)) == ["good"]
    found = intake.store.index.quarantined()
    assert {row["name"] for row in found} == {*bad, "link.npz"}
    assert all(row["reason"] for row in found)
    assert intake.store.summary()["quarantined"] == len(bad) + 1
    assert secret.exists()
    kept = {file.name.split("-", 1)[1]: file for file in (intake.store.folder / "quarantine").iterdir()}
    assert kept["what.xyz"].read_bytes() == b"?"


def _pickled() -> bytes:
    import io

    out = io.BytesIO()
    np.savez(out, x=np.array([{"a": 1}], dtype=object))
    return out.getvalue()


def test_files_that_are_being_written_are_left_alone(tmp_path: Path) -> None:
    with SampleStore(tmp_path / "store", TOY) as store:
        intake = Intake(store, tmp_path / "inbox", settle_s=0.05)
        data = content(1)
        for name in (".a.npz", "a.npz.tmp", "a.npz.part"):
            (intake.inbox / name).write_bytes(data)
        (intake.inbox / "folder").mkdir()
        assert intake.poll() == (0, 0)
        growing = intake.inbox / "b.npz"
        for cut in (10, 20, len(data)):
            growing.write_bytes(data[:cut])
            assert intake.poll() == (0, 1), "seen for the first time, or changed since"
        eventually(lambda: intake.poll() == (1, 0))
        assert list(state(intake)) == ["b"]
        assert store.summary()["quarantined"] == 0


def test_a_full_disk_leaves_the_file_where_it_is(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_core.contracts.errors import EnvironmentFault

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (intake.inbox / "a.npz").write_bytes(content(1))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfile", full)
        with pytest.raises(EnvironmentFault, match="No space"):
            intake.poll()
    assert (intake.inbox / "a.npz").exists()
    intake.poll()
    assert list(state(intake)) == ["a"]


def test_kill_9_of_the_intake_at_any_point_takes_each_file_once(tmp_path: Path) -> None:
    store_folder, inbox = tmp_path / "store", tmp_path / "inbox"
    prepare(store_folder, Limits())
    inbox.mkdir()
    for number in range(60):
        (inbox / f"s{number}.npz").write_bytes(content(number))
    (inbox / "labels.csv").write_text("id,label\n" + "".join(f"s{n},{n}\n" for n in range(60)))
    command = [sys.executable, "-m", "fl_clients.edge.samples.intake", "--application", "toy_regression"]
    command += ["--store", str(store_folder), "--inbox", str(inbox), "--settle", "0", "--idle", "0.2"]
    for left in (45, 30, 10):
        with subprocess.Popen(command, cwd=ROOT) as process:
            eventually(lambda left=left: len(list(inbox.iterdir())) <= left or process.poll() is not None, 60)
            os.kill(process.pid, signal.SIGKILL)
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 0
    assert not list(inbox.iterdir())
    with SampleStore(store_folder, TOY) as store:
        entries = store.index.entries(labelled=True)
        assert {entry.id: entry.label for entry in entries} == {f"s{n}": float(n) for n in range(60)}
        assert {f.name for f in (store_folder / "content").iterdir() if f.name[0] != "."} == store.index.files()
        assert store.summary()["quarantined"] == 0


@needs_mosquitto
def test_messages_of_a_local_broker_become_files(tmp_path: Path) -> None:
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    assert MOSQUITTO
    port, inbox = free_port(), tmp_path / "inbox"
    inbox.mkdir()
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    settings = SampleSettings(enabled=True, mqtt_topics=("sensors/#",), mqtt_port=port)
    with subprocess.Popen([MOSQUITTO, "-c", str(config)], stdout=-3, stderr=-3) as broker:
        source = TopicSource(settings, inbox, client_id="fieldfleet-test")
        source.start()
        try:
            assert source.ready.wait(60)
            publisher = paho.Client(CallbackAPIVersion.VERSION2)
            publisher.connect("127.0.0.1", port)
            publisher.loop_start()
            for topic, payload in {
                "sensors/labels": b'{"id": "a", "label": 4}',
                "sensors/values": b'{"id": "a", "arrays": {"x": [1, 2]}}',
                "sensors/raw/b": content(2),
                "sensors/odd": b"nonsense",
            }.items():
                publisher.publish(topic, payload, qos=1).wait_for_publish(30)
            eventually(lambda: len(list(inbox.glob("*.*"))) == 3 and source.refused == 1, 60)
            publisher.loop_stop()
            publisher.disconnect()
        finally:
            source.stop()
            broker.terminate()
    with SampleStore(tmp_path / "store", TOY) as store:
        Intake(store, inbox, settle_s=0).poll()
        assert {e.id: e.label for e in store.index.entries(labelled=False)} == {"a": 4.0, "b": None}


def test_names_of_files_from_topics() -> None:
    assert file_name("x/a.b", b"\x89PNG...") == "a.b.png"
    assert file_name("x/..", b"\x89PNG...") is None
    assert file_name("x/y", b"") is None
    assert file_name("x/y", b'{"id": "n-1"}') == "n-1.json"
    odd = file_name("x/y", b'{"id": "../n"}')
    assert odd is not None
    assert "/" not in odd
