"""What clients keep: versions by round, both stores held to one plain model; damage; memory of a million clients."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.counted import counted_round, to_arrays
from fl_core.contracts.errors import ConfigError, InputError, IntegrityError
from fl_core.learning.client_states import ClientStates, FolderStates, SlotStates
from fl_core.learning.personal import personal_names

KINDS = ("folder", "slots")


def store(kind: str, folder: Path, clients: tuple[str, ...] = ("van-1", "van-2")) -> ClientStates:
    return FolderStates(folder, "run-1") if kind == "folder" else SlotStates(folder, clients.index)


def state(value: float) -> dict[str, Any]:
    return {"c/w": np.full((2, 3), value, np.float32), "n": np.array(value, np.float64), "k": np.zeros(0, np.int64)}


def value(found: dict[str, Any]) -> float | None:
    if not found:
        return None
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in state(0).items()}
    assert (found["c/w"] == found["n"]).all()
    return float(found["n"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(fates=st.lists(st.sampled_from(["counted", "lost", "late", "repeated"]), max_size=12))
def test_the_state_is_that_of_the_update_counted_last(
    tmp_path_factory: pytest.TempPathFactory, kind: str, fates: list[str]
) -> None:
    """Whatever happens to the updates, as a server sees it; a late one counts after the next was already sent."""
    folder = tmp_path_factory.mktemp("states")
    counted, expected, late = 0, None, 0
    for number, fate in enumerate(fates, start=1):
        states = store(kind, folder)  # the client was restarted
        assert value(states.read("van-1", counted)) == expected
        assert states.read("van-2", 0) == {}
        for _ in range(2 if fate == "repeated" else 1):
            states.write("van-1", number, counted, state(float(number)))
        if fate in ("counted", "repeated"):
            counted, expected, late = number, float(number), 0
        elif late:
            counted, expected, late = late, float(late), 0
        if fate == "late":
            late = number


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_missing_state_is_lost_and_said(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = store(kind, tmp_path)
    assert states.read("van-1", 3) == {}
    states.write("van-1", 1, 0, state(1.0))
    assert states.read("van-1", 2) == {}
    (file,) = [p for p in tmp_path.rglob("*") if p.suffix == ".safetensors" or p.name == "slots"]
    data = bytearray(file.read_bytes())
    data[-20 if kind == "folder" else 70] ^= 0xFF
    file.write_bytes(data[:-1] if kind == "folder" else data)
    assert store(kind, tmp_path).read("van-1", 1) == {}
    assert caplog.text.count("starts afresh") == 3
    states.write("van-1", 2, 1, state(2.0))
    assert value(states.read("van-1", 2)) == 2.0


def test_a_device_drops_the_states_of_old_runs(tmp_path: Path) -> None:
    for i in range(7):
        FolderStates(tmp_path, f"run-{i}").write("van-1", 1, 0, state(1.0))
    assert len(list(tmp_path.iterdir())) == 4
    assert value(FolderStates(tmp_path, "run-6").read("van-1", 1)) == 1.0


def test_a_million_clients_take_the_space_of_those_that_were_touched(tmp_path: Path) -> None:
    states = SlotStates(tmp_path, int)
    for i in range(0, 1_000_000, 100_000):
        states.write(str(i), 1, 0, state(float(i)))
    states.write("999999", 1, 0, state(-1.0))
    assert value(states.read("999999", 1)) == -1.0
    file = (tmp_path / "slots").stat()
    assert file.st_size > 3_000_000_000
    assert file.st_blocks * 512 < 200_000
    states.close()
    copy = pickle.loads(pickle.dumps(states))  # into a worker process
    assert value(copy.read("100000", 1)) == 100_000.0
    copy.close()


def test_slots_refuse_another_layout(tmp_path: Path) -> None:
    states = SlotStates(tmp_path, ["van-1"].index)
    states.write("van-1", 1, 0, state(1.0))
    with pytest.raises(InputError, match="van-1: its state has other arrays"):
        states.write("van-1", 2, 1, {"c/w": np.zeros(1)})
    states.close()


def test_clients_are_told_what_was_counted_without_each_others_names() -> None:
    told = to_arrays({"van-1": 4, "van-2": 0})
    assert [counted_round(told, name, origin="server") for name in ("van-1", "van-2")] == [4, 0]
    assert b"van" not in b"".join(a.tobytes() for a in told.values())
    for bad in ({}, {**told, "counted/rounds": np.zeros(1, np.int64)}, {k: v.astype(float) for k, v in told.items()}):
        with pytest.raises(IntegrityError, match="server"):
            counted_round(bad, "van-1", origin="server")
    with pytest.raises(IntegrityError, match="van-3"):
        counted_round(told, "van-3", origin="server")


def test_personal_layers_by_pattern() -> None:
    names = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert personal_names(names, ["head.*"]) == {"head.weight", "head.bias"}
    assert personal_names(names, []) == frozenset()
    with pytest.raises(ConfigError, match=r"'tail\.\*' fits no array"):
        personal_names(names, ["head.*", "tail.*"])
    with pytest.raises(ConfigError, match="nothing would be learned together"):
        personal_names(names, ["*"])
