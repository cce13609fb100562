"""Simulated device states: the same choice as the server's for the same states; traces, generated days, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.device_state import DeviceState
from fl_core.contracts.errors import DataError
from fl_core.contracts.sections import SelectionConfig
from fl_core.identity import keys
from fl_server.device_states import DeviceStates
from fl_server.device_table import DeviceTable
from fl_server.history import RoundRecord, read_history
from fl_server.registry import Registry
from fl_server.selection import StateSelector
from simulations.device_states import GeneratedStates, SimulatedSelector, TraceStates, open_states
from simulations.simulate import simulate
from tests.federation import new_key
from tests.helpers import small_config

TOY = "toy_regression"
NAMES = [f"van-{i}" for i in range(12)]
EXAMPLES = {name: 10 * (i + 1) for i, name in enumerate(NAMES)}
SETTINGS = SelectionConfig(min_battery=0.4, allow_metered=False, max_temperature_c=60.0, min_examples=20)


def trace(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("fairness", ["uniform", "least_recent"])
def test_the_server_and_the_simulator_choose_the_same(tmp_path: Path, fairness: str) -> None:
    """The same states: once through the server's table of devices, once through a trace."""
    settings = SelectionConfig(min_battery=0.4, allow_metered=False, min_examples=20, fairness=fairness)
    table, registry = DeviceTable(tmp_path / "devices.db"), Registry(tmp_path / "registry.db")
    rows = []
    for i, name in enumerate(NAMES):
        registry.register(name, keys.public_pem(new_key(tmp_path / name)))
        told = {"battery_level": i / 11, "metered": i % 4 == 0, "num_examples": EXAMPLES[name], "network": "wifi"}
        table.note_posted(name, {"device": told})
        rows.append({"time": 0, "device": name, **told})
    source = TraceStates(trace(tmp_path / "trace.jsonl", *rows), EXAMPLES)
    simulated = SimulatedSelector(settings, source, seed=5, application=TOY)
    deployed = StateSelector(settings, DeviceStates(table, registry), seed=5, application=TOY, clock=lambda: 0.0)
    for number in range(1, 8):
        choice = deployed.choose(NAMES, 3, round=number)
        assert simulated.choose(NAMES, 3, round=number) == choice
        assert len(choice.chosen) == 3
        assert choice.skipped
        record = RoundRecord(round=number, clients={name: {} for name in choice.chosen})
        simulated.note(record)
        deployed.note(record)
    table.close()
    registry.close()


def test_a_trace_is_followed_in_its_own_time(tmp_path: Path) -> None:
    rows = [
        {"time": 3_600, "device": "van-1", "battery_level": 0.9, "network": "wifi"},
        {"time": 0, "device": "van-1", "battery_level": 0.1},
        {"time": 7_200, "device": "van-1", "network": "none"},
    ]
    source = TraceStates(trace(tmp_path / "trace.jsonl", *rows), {"van-1": 7, "van-2": 3})
    assert source.states(0.0)["van-1"] == DeviceState(battery_level=0.1, num_examples=7, seen_at=0.0)
    assert source.states(0.0)["van-2"] == DeviceState(num_examples=3)
    selector = SimulatedSelector(SelectionConfig(min_battery=0.5), source, seed=0, application=TOY)
    found = [selector.choose(["van-1", "van-2"], 0, round=number) for number in (1, 2, 3)]
    assert [choice.chosen for choice in found] == [("van-2",), ("van-1", "van-2"), ("van-2",)]
    assert list(found[0].skipped) == ["van-1"]
    assert not found[2].skipped, "a device that is offline is not passed over: it is not there"


def test_a_csv_says_the_same_as_json_lines(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(
        "time,device,battery_level,charging,network,tags,num_examples\n0,van-1,0.5,true,wifi,a;b,\n60.5,van-1,1,,,,4\n"
    )
    rows = [
        {"time": 0, "device": "van-1", "battery_level": 0.5, "charging": True, "network": "wifi", "tags": ["a", "b"]},
        {"time": 60.5, "device": "van-1", "battery_level": 1, "num_examples": 4},
    ]
    lines = TraceStates(trace(tmp_path / "trace.jsonl", *rows), EXAMPLES)
    table = TraceStates(tmp_path / "trace.csv", EXAMPLES)
    for time in (0.0, 60.0, 60.5):
        assert table.states(time) == lines.states(time)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"time": -1, "device": "van-1"}, "row 1: time"),
        ({"time": 0}, "device is missing"),
        ({"time": 0, "device": "van-1", "battery_level": 50}, "battery_level"),
        ({"time": 0, "device": "bus-1"}, "clients: van-0"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_row(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        TraceStates(trace(tmp_path / "trace.jsonl", row), EXAMPLES)
    assert words in str(error.value)
    (tmp_path / "broken").write_text("{")
    with pytest.raises(DataError, match="not a trace"):
        TraceStates(tmp_path / "broken", EXAMPLES)
    with pytest.raises(DataError, match="not readable"):
        open_states(str(tmp_path / "absent"), EXAMPLES, 0)


def test_generated_days_are_plausible_and_repeatable() -> None:
    first, again = GeneratedStates(EXAMPLES, 3), GeneratedStates(EXAMPLES, 3)
    again.states(40 * 3_600.0)  # in one leap
    charging, levels = set(), []
    for hour in range(96):
        states = first.states(hour * 3_600.0)
        if hour >= 40:
            assert again.states(hour * 3_600.0) == states
        for state in states.values():
            assert state.battery_level is not None
            assert state.network == "none" or state.metered == (not state.charging)
            charging.add(state.charging)
            levels.append(state.battery_level)
    assert charging == {True, False}
    assert min(levels) < 0.4 < 0.9 < max(levels)
    before = first.states(96 * 3_600.0)["van-1"].battery_level
    first.trained(["van-1"], 96 * 3_600.0)
    after = first.states(96 * 3_600.0)["van-1"].battery_level
    assert before is not None
    assert after is not None
    assert after < before or before == 0


def federate(out: Path, rounds: int) -> list[RoundRecord]:
    app, config = small_config(
        TOY,
        "data.clients=8",
        "algorithm.clients_per_round=2",
        "selection.min_battery=0.6",
        "selection.fairness=least_recent",
        "algorithm.evaluate_every=0",
        "algorithm.deadline_s=0.5",
    )
    raw = app.generate(config, 0)
    simulate(app, config, raw, start=None, num_rounds=rounds, seed=1, out=out, device_states="generated")
    return read_history(out)


def test_a_resumed_simulation_chooses_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole = federate(tmp_path / "whole", 12)
    chosen = [sorted(record.clients) for record in whole]
    assert any(record.skipped for record in whole)
    assert len({tuple(names) for names in chosen}) > 1
    # the number of rounds is part of what a round is: an interrupted run repeats its last rounds
    first = federate(tmp_path / "cut", 12)
    assert [record.model_sha256 for record in first] == [record.model_sha256 for record in whole]
    for folder in sorted((tmp_path / "cut").glob("round-*"))[-2:]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()
    again = federate(tmp_path / "cut", 12)
    assert [sorted(record.clients) for record in again] == chosen
    assert [record.skipped for record in again] == [record.skipped for record in whole]
    assert again[-1].model_sha256 == whole[-1].model_sha256


def test_without_states_only_the_data_are_known() -> None:
    selector = SimulatedSelector(
        SelectionConfig(min_examples=50, min_battery=0.9), open_states("", EXAMPLES, 0), seed=0, application=TOY
    )
    choice = selector.choose(NAMES, 0, round=1)
    assert set(choice.chosen) == {name for name, number in EXAMPLES.items() if number >= 50}
