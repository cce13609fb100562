"""The store of samples: against a plain model, under crashes, quota, retention, labels that come before and after."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fl_clients.edge.home import AgentHome
from fl_clients.edge.samples.index import Limits
from fl_clients.edge.samples.keeper import SampleKeeper
from fl_clients.edge.samples.store import SampleStore, data_version, open_data
from fl_clients.edge.settings import AgentSettings, DeviceSettings, SampleSettings, ServerSettings
from fl_core.contracts.errors import DataError, EnvironmentFault, InputError
from fl_core.learning.application import application
from tests.helpers import ROOT, small_config

TOY = application("toy_regression")
CONFIG = TOY.configure(["data.features=2"])
DAY = 86_400.0


def toy_store(folder: Path, **limits: Any) -> SampleStore:
    return SampleStore(folder, TOY, Limits(**limits))


def x(number: float) -> dict[str, Any]:
    return {"x": np.array([number, 1.0], np.float32)}


class Machine(RuleBasedStateMachine):
    """At most 5 samples of at most 10 days, against dictionaries that follow the same rules."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="samples-"))
        self.now = time.time()
        self.samples: dict[str, tuple[float, float | None]] = {}
        self.waiting: dict[str, float] = {}
        self.open()

    def open(self) -> None:
        self.store = toy_store(self.folder, max_samples=5, max_age_s=10 * DAY)

    @rule(name=st.sampled_from("abcdefgh"), age=st.integers(0, 12), label=st.none() | st.integers(0, 3))
    def add(self, name: str, age: int, label: int | None) -> None:
        moment = self.now - age * DAY - ord(name)
        new = self.store.add(name, x(ord(name)), moment, label)
        assert new == (name not in self.samples)
        if new:
            known = self.waiting.pop(name, label)
            self.samples[name] = (moment, None if known is None else float(known))
        self.bound()

    @rule(name=st.sampled_from("abcdefgh"), label=st.integers(0, 3))
    def label(self, name: str, label: int) -> None:
        found = self.store.label(name, label)
        if name not in self.samples:
            assert found == "waiting"
            self.waiting[name] = label
        else:
            assert found == ("unchanged" if self.samples[name][1] == label else "labelled")
            self.samples[name] = (self.samples[name][0], float(label))

    @rule()
    def crash(self) -> None:
        """Whoever opens the store next sees the same; what a crash left in content/ does no harm."""
        (self.folder / "content" / "stray.npz").write_bytes(b"torn")
        self.store.index.close()
        self.open()
        self.store.sweep()

    @rule()
    def damaged(self) -> None:
        with pytest.raises(DataError):
            self.store.add("bad", {"x": np.array([np.nan, 1.0])})
        if self.samples:
            with pytest.raises(DataError, match="schema"):
                self.store.add("wide", {"x": np.zeros(3)})
        with pytest.raises(DataError):
            self.store.label("a", "not a number")

    def bound(self) -> None:
        kept = {name: value for name, value in self.samples.items() if value[0] >= self.now - 10 * DAY}
        newest = sorted(kept, key=lambda name: (kept[name][0], name))[-5:]
        self.samples = {name: kept[name] for name in newest}

    @invariant()
    def as_the_model(self) -> None:
        entries = self.store.index.entries(labelled=False)
        assert {e.id: (e.time, e.label) for e in entries} == self.samples
        assert {e.id for e in self.store.index.entries(labelled=True)} == {
            name for name, (_, label) in self.samples.items() if label is not None
        }
        content = {file.name for file in (self.folder / "content").iterdir()} - {"stray.npz"}
        assert content == {entry.file for entry in entries}
        assert self.store.summary()["waiting_labels"] == len(self.waiting)

    def teardown(self) -> None:
        self.store.index.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_a_snapshot_is_frozen_while_samples_come_are_labelled_and_expire(tmp_path: Path) -> None:
    store, now = toy_store(tmp_path, max_samples=3), time.time() - 1000
    for name in "abc":
        store.add(name, x(ord(name)), now + ord(name), label=1.0)
    store.add("c", x(ord("c")))
    with store.snapshot(CONFIG, labelled=True, client="van-1") as snapshot:
        before = TOY.read(snapshot.folder).examples(CONFIG)
        store.label("c", 7)
        for name in "def":
            store.add(name, x(ord(name)), now + ord(name), label=2.0)
        after = TOY.read(snapshot.folder).examples(CONFIG)
        assert snapshot.ids == ("a", "b", "c")
        np.testing.assert_array_equal(before.targets, after.targets)
    with store.snapshot(CONFIG, labelled=True, client="van-1") as later:
        assert later.ids == ("d", "e", "f")
        assert later.id != snapshot.id
    store.index.close()


def test_the_version_changes_with_the_labelled_samples_only(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    with pytest.raises(DataError, match="no labelled samples"), store.snapshot(CONFIG, labelled=True, client="v"):
        pass
    store.add("a", x(1), label=1)
    version = data_version(TOY, CONFIG, tmp_path)
    store.add("b", x(2))
    assert data_version(TOY, CONFIG, tmp_path) == version
    store.label("b", 2)
    changed = data_version(TOY, CONFIG, tmp_path)
    assert changed != version
    store.label("b", 3)
    assert data_version(TOY, CONFIG, tmp_path) not in (version, changed)
    assert data_version(TOY, CONFIG, tmp_path / "elsewhere") == ""
    store.index.close()


def test_snapshots_in_use_stay_others_are_pruned(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    store.add("a", x(1), label=0)
    with store.snapshot(CONFIG, labelled=True, client="v") as first:
        for label in range(1, 6):
            store.label("a", label)
            with store.snapshot(CONFIG, labelled=True, client="v") as found:
                assert float(TOY.read(found.folder).examples(CONFIG).targets[0]) == label
        assert first.folder.is_dir()
    folders = [f for f in (tmp_path / "snapshots").iterdir() if f.name[0] != "."]
    assert len(folders) <= 3
    store.index.close()


def test_one_id_one_content_one_schema(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    assert store.add("a", x(1))
    assert not store.add("a", x(1))
    with pytest.raises(DataError, match="another content"):
        store.add("a", x(2))
    with pytest.raises(DataError, match="schema"):
        store.add("b", {"x": np.zeros(3)})
    with pytest.raises(DataError, match="must match"):
        store.add("../a", x(1))
    assert [f.name for f in (tmp_path / "content").iterdir()] == [store.index.entries(labelled=False)[0].file]
    summary = store.summary()
    assert (summary["samples"], summary["labelled"], summary["repeated"]) == (1, 0, 1)
    store.index.close()


def test_more_than_the_quota_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = toy_store(tmp_path, max_bytes=100)
    with pytest.raises(DataError, match="over the quota"):
        store.add("a", x(1))
    store.index.close()
    store = toy_store(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFault, match="full"):
        store.add("a", x(1))
    assert store.summary()["samples"] == 0
    assert not list((tmp_path / "content").iterdir())
    store.index.close()


def test_a_sample_from_the_future_counts_as_of_now(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    store.add("a", x(1), time.time() + 900 * DAY)
    assert store.index.entries(labelled=False)[0].time <= time.time()
    store.index.close()


def test_quarantined_files_are_bounded_their_reasons_stay(tmp_path: Path) -> None:
    store = toy_store(tmp_path, max_bytes=10_000)
    for number in range(5):
        file = tmp_path / f"bad-{number}.npz"
        file.write_bytes(b"x" * 400)
        store.quarantine(file.name, file, "damaged")
        assert not file.exists()
    assert sum(1 for _ in (tmp_path / "quarantine").iterdir()) == 2, "a tenth of the quota"
    assert len(store.index.quarantined()) == store.summary()["quarantined"] == 5
    store.index.close()


def test_a_damaged_index_does_not_silence_the_agent(tmp_path: Path) -> None:
    settings = AgentSettings(
        server=ServerSettings(url="https://127.0.0.1:1"),
        device=DeviceSettings(applications=("toy_regression",)),
        samples=SampleSettings(enabled=True),
    )
    keeper = SampleKeeper(AgentHome(tmp_path), settings)
    assert keeper.summaries()["toy_regression"]["samples"] == 0
    index = tmp_path / "applications" / "toy_regression" / "samples" / "samples.db"
    for name in ("samples.db-wal", "samples.db-shm"):
        index.with_name(name).unlink(missing_ok=True)
    index.write_bytes(b"damaged" * 1000)
    assert keeper.summaries() == {}


def test_an_index_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EnvironmentFault, match=r"samples\.db"):
        toy_store(tmp_path)


CHILD = """
import sys, pathlib, itertools
import numpy as np
from fl_clients.edge.samples.store import SampleStore
from fl_core.learning.application import application
store = SampleStore(pathlib.Path(sys.argv[1]), application("toy_regression"))
for number in itertools.count():
    store.add(f"s{number}", {"x": np.array([number, 1.0])}, label=number)
    print(number, flush=True)
"""


def test_kill_9_keeps_every_sample_that_was_added(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        while int(last := child.stdout.readline()) < 15:
            pass
        os.kill(child.pid, signal.SIGKILL)
    with toy_store(tmp_path) as store, store.snapshot(CONFIG, labelled=True, client="v") as snapshot:
        found = TOY.read(snapshot.folder).examples(CONFIG)
        assert len(found) == len(snapshot.ids) >= int(last) + 1
        assert sorted(found.targets.tolist()) == [float(n) for n in range(len(found))]


# every application that has samples


def test_plant_disease_photographs_are_linked_and_read(tmp_path: Path) -> None:
    app, config = small_config("plant_disease")
    raw = app.generate(config, 0)
    with SampleStore(tmp_path / "s", app) as store:
        for number, leaf in enumerate(raw.leaves[:6]):  # type: ignore[attr-defined]
            store.add(f"leaf-{number}", {"image": np.ascontiguousarray(leaf.source)}, label=leaf.facts.label)
        store.add("new", {"image": np.full((40, 40, 3), 90, np.uint8)})
        store.label("leaf-5", "a disease of another crop")
        with pytest.raises(DataError):
            store.label("leaf-4", "")
        with store.snapshot(config, labelled=True, client="camera-1") as snapshot:
            assert snapshot.ids == tuple(f"leaf-{n}" for n in range(5)), "an unknown class cannot be learned"
            examples = app.read(snapshot.folder).examples(config)
            assert examples.columns["client"].tolist() == ["camera-1"] * 5
            image = next(snapshot.folder.glob("leaf-0.*"))
            assert image.stat().st_nlink > 1, "a hard link, not a copy"
    with open_data(app, config, tmp_path / "s", labelled=False, client="camera-1") as data:
        assert len(data.examples(config)) == 7


def test_driver_conflict_drives_become_windows(tmp_path: Path) -> None:
    app, config = small_config("driver_conflict")
    raw: Any = app.generate(config, 0)
    events = [event for event in raw.events if event.usable][:3]
    with SampleStore(tmp_path / "s", app) as store:
        for event in events:
            first, last = event.conflict
            label = {
                "event_start_row": str(first),
                "event_end_row": last,
                "incident_type": event.facts["incident_type"],
            }
            store.add(f"drive-{event.event_id}", {"X": event.rows, "channels": np.array(raw.channels)}, label=label)
        store.add("unlabelled", {"X": events[0].rows, "channels": np.array(raw.channels)})
        store.add("short", {"X": events[1].rows, "channels": np.array(raw.channels)})
        store.label("short", {"event_start_row": 1, "event_end_row": 10**6})
        with store.snapshot(config, labelled=True, client="van-1") as snapshot:
            assert len(snapshot.ids) == 3, "a conflict beyond the drive's end cannot be learned"
            found = app.read(snapshot.folder).examples(config)
    expected = raw.select([e.client for e in events]).examples(config)
    wanted = np.isin(expected.columns["event_id"], [e.event_id for e in events])
    assert sorted(found.targets.tolist()) == sorted(expected.targets[wanted].tolist())
    with open_data(app, config, tmp_path / "s", labelled=False, client="van-1") as data:
        assert len(data.examples(config)) > len(found)


def test_an_application_of_whole_data_sets_is_refused(tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(InputError, match="whole data sets"):
        SampleStore(tmp_path, dataclasses.replace(TOY, samples=None))
