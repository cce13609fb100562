"""The circuit breaker of the training worker: rules, persistence, and the fleet link that obeys it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.training.breaker import LAST_PAUSE_S, LIMIT, Breaker, Circuit

events = st.lists(st.tuples(st.sampled_from(["crash", "success"]), st.integers(1, 3)), max_size=30)


@given(events)
def test_open_after_crashes_in_a_row_on_one_run(steps: list[tuple[str, int]]) -> None:
    circuit, row = Circuit(version="1"), list[int]()
    for step, run in steps:
        if step == "crash":
            row = [*row, run] if row[-1:] == [run] else [run]
            circuit = circuit.crashed(run, "killed")
        else:
            row = []
            circuit = circuit.succeeded()
        for asked in (1, 2, 3):
            assert circuit.open_for(asked) == (len(row) >= LIMIT and row[0] == asked)
            assert (circuit.pause(asked) > 0) == (row[-1:] == [asked])
            assert circuit.pause(asked) <= LAST_PAUSE_S
        assert bool(circuit.disabled) == (len(row) >= LIMIT)


def test_it_outlives_the_agent_but_not_a_new_version_or_an_operator(tmp_path: Path) -> None:
    file = tmp_path / "fleet" / "breaker.json"
    file.parent.mkdir()
    for _ in range(LIMIT):
        Breaker(file, "1").crashed(7, "was ended by signal 9")
    again = Breaker(file, "1")
    assert again.circuit.open_for(7)
    assert not again.circuit.open_for(8)
    assert "signal 9" in again.circuit.disabled
    assert not Breaker(file, "2").circuit.open_for(7)
    again.reset()
    assert not Breaker(file, "1").circuit.open_for(7)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"version": "1", "run_id": "x", "crashes": 1, "reason": ""}'])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "breaker.json"
    file.write_text(damage)
    assert Breaker(file, "1").circuit == Circuit(version="1")
