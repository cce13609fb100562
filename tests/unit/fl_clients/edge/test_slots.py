"""The slots' rules, by themselves and on a disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fl_clients.edge import slots
from fl_clients.edge.slots import Slots, SlotState, current_bundle, decide, installed, rejected, rolled_back
from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from tests.bundles import TARGET, damage, toy_bundle


@pytest.mark.parametrize(
    ("state", "offered", "decision"),
    [
        (SlotState(), 1, "install"),
        (SlotState("A", {"A": 3}, 3), 3, "up-to-date"),
        (SlotState("A", {"A": 3}, 3), 4, "install"),
        (SlotState("A", {"A": 3}, 3), 2, "downgrade"),
        (SlotState("B", {"A": 3, "B": 2}, 3, frozenset({3})), 3, "rejected"),
        (SlotState("B", {"A": 3, "B": 2}, 3, frozenset({3})), 4, "install"),
        (SlotState("B", {"B": 2}, 3), 3, "install"),  # killed between the record and the switch
        (SlotState("A", {"A": 3}, 0), 2, "downgrade"),  # a lost state file
    ],
)
def test_decisions(state: SlotState, offered: int, decision: str) -> None:
    assert decide(state, offered) == decision


class Rules(RuleBasedStateMachine):
    """Whatever is offered and however often it is rolled back: no version twice after its rejection, never downwards."""

    def __init__(self) -> None:
        super().__init__()
        self.state = SlotState()
        self.put: list[int] = []

    @rule(version=st.integers(1, 12))
    def offer(self, version: int) -> None:
        if decide(self.state, version) == "install":
            assert version not in self.state.rejected
            assert not self.put or version >= max(self.put)
            self.put.append(version)
            self.state = installed(self.state, version)
            assert self.state.version == version

    @rule()
    def roll_back(self) -> None:
        before = self.state
        try:
            self.state = rolled_back(before)
        except InputError:
            assert before.current is None or len(before.versions) == 1
        else:
            assert before.version in self.state.rejected
            assert self.state.current != before.current

    @rule(version=st.integers(1, 12))
    def reject(self, version: int) -> None:
        self.state = rejected(self.state, version)

    @invariant()
    def current_holds_a_version(self) -> None:
        assert (self.state.current is None) == (self.state.version is None)
        assert self.state.highest == max(self.put, default=0)


test_rules = Rules.TestCase


def staged(home: Path, version: int) -> Path:
    """A bundle of that version, as the updater leaves it for the slots."""
    folder = toy_bundle(home / "staging" / str(version), seed=version)
    table = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**table, "version": version}))
    return folder


def test_a_new_home_has_no_bundle(tmp_path: Path) -> None:
    assert current_bundle(tmp_path) is None
    assert Slots(tmp_path).state() == SlotState()
    assert Slots(tmp_path).identity() is None
    with pytest.raises(EnvironmentFault, match="no model was ever installed"):
        slots.roll_back(tmp_path)


def test_installing_alternates_and_rolling_back_returns(tmp_path: Path) -> None:
    store = Slots(tmp_path)
    seen = []
    for version in (1, 2, 3):
        store.install(staged(tmp_path, version), version, TARGET)
        bundle = current_bundle(tmp_path)
        assert bundle is not None
        seen.append((os.readlink(store.folder / "current"), bundle.manifest.version, store.identity()))
    assert [s[:2] for s in seen] == [("A", 1), ("B", 2), ("A", 3)]
    assert len({s[2] for s in seen}) == 3
    back = slots.roll_back(tmp_path)
    assert (back.version, back.rejected) == (2, frozenset({3}))
    assert store.state() == back
    assert decide(store.state(), 3) == "rejected"
    store.install(staged(tmp_path, 4), 4, TARGET)
    assert store.state().version == 4


def test_the_first_bundle_cannot_be_rolled_back(tmp_path: Path) -> None:
    store = Slots(tmp_path)
    store.install(staged(tmp_path, 1), 1, TARGET)
    with pytest.raises(InputError, match="no former model"):
        store.roll_back()
    assert store.state().version == 1


def test_a_damaged_former_bundle_is_not_rolled_back_to(tmp_path: Path) -> None:
    store = Slots(tmp_path)
    for version in (1, 2):
        store.install(staged(tmp_path, version), version, TARGET)
    damage(store.folder / "A" / f"model.{TARGET}.onnx")
    with pytest.raises(IntegrityError, match="sha256"):
        store.roll_back()
    assert store.state().version == 2
    assert store.state().rejected == frozenset()


@pytest.mark.parametrize("name", [f"model.{TARGET}.onnx", "golden.npz", "manifest.json", "installed.json"])
def test_a_damaged_bundle_in_use_is_an_integrity_error(tmp_path: Path, name: str) -> None:
    store = Slots(tmp_path)
    store.install(staged(tmp_path, 1), 1, TARGET)
    (store.folder / "A" / name).write_bytes(b"{")
    with pytest.raises(IntegrityError, match=r"A/|A:"):
        current_bundle(tmp_path)


def test_a_lost_or_damaged_state_file_costs_rejections_only(tmp_path: Path) -> None:
    store = Slots(tmp_path)
    store.install(staged(tmp_path, 1), 1, TARGET)
    (store.folder / "state.json").write_text("{]")
    assert store.state() == SlotState("A", {"A": 1})
    store.install(staged(tmp_path, 2), 2, TARGET)
    assert (store.state().version, store.state().highest) == (2, 2)


@pytest.mark.parametrize("link", ["../elsewhere", "/etc", "C", ""])
def test_a_foreign_link_counts_as_none(tmp_path: Path, link: str) -> None:
    store = Slots(tmp_path)
    store.folder.mkdir()
    if link:
        (store.folder / "current").symlink_to(link)
    assert store.current_slot() is None
    assert current_bundle(tmp_path) is None


def test_leftovers_of_a_crash_do_not_hinder(tmp_path: Path) -> None:
    store = Slots(tmp_path)
    store.install(staged(tmp_path, 1), 1, TARGET)
    shutil.copytree(store.folder / "A", store.folder / ".B.old")
    shutil.copytree(store.folder / "A", store.folder / "B")
    (store.folder / "B" / "manifest.json").unlink()  # killed in the middle of a copy, say
    assert store.state() == SlotState("A", {"A": 1}, 1)
    store.install(staged(tmp_path, 2), 2, TARGET)
    assert store.state().version == 2
    assert not (store.folder / ".B.old").exists()
