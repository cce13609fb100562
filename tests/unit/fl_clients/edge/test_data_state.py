"""How much data there is, for the server: folders, the worker's counts, sample stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fl_clients.edge.data_state import LOOK_EVERY_S, DataStates, newest_time, of_samples
from fl_core.contracts.device_state import DataState

TOY = "toy_regression"


def put(file: Path, time: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time, time))


class Device:
    def __init__(self, folder: Path, **samples: Any) -> None:
        self.now = 1_000.0
        self.states = DataStates(
            {TOY: folder / "toy", "leaves": folder / "leaves"},
            folder / "data-state.json",
            lambda: samples,
            clock=lambda: self.now,
        )


def test_the_workers_counts_and_the_folders_times(tmp_path: Path) -> None:
    put(tmp_path / "toy" / "a", 100.0)
    put(tmp_path / "toy" / "deeper" / "b", 400.0)
    device = Device(tmp_path)
    assert device.states() == {TOY: DataState(age_s=600.0), "leaves": DataState()}
    device.states.counted(TOY, 64)
    device.states.counted(TOY, 64)
    put(tmp_path / "toy" / "c", 990.0)
    assert device.states()[TOY] == DataState(num_examples=64, age_s=600.0)
    device.now += LOOK_EVERY_S
    assert device.states()[TOY] == DataState(num_examples=64, age_s=310.0)
    again = Device(tmp_path)
    assert again.states()[TOY].num_examples == 64, "after a restart, before it trains"
    (tmp_path / "data-state.json").write_text('{"toy_regression": -1, "../x": 3, "leaves": 4}')
    assert {name: state.num_examples for name, state in Device(tmp_path).states().items()} == {TOY: None, "leaves": 4}
    (tmp_path / "data-state.json").write_text("[")
    assert Device(tmp_path).states()[TOY].num_examples is None


def test_a_sample_store_comes_before_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "toy" / "a", 100.0)
    device = Device(tmp_path, **{TOY: {"labelled": 3, "newest": 990.0}})
    assert device.states() == {TOY: DataState(num_examples=3, age_s=10.0), "leaves": DataState()}
    assert of_samples({TOY: {"labelled": 0, "newest": None}}, 0.0) == {TOY: DataState(num_examples=0)}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert newest_time(tmp_path / "absent") is None
