"""Clients whose own code fails cost the round their reply, never the run; a run in which nothing happened is no success."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.errors import GoalMissed
from fl_core.learning.examples import Examples
from fl_server.history import check_applied
from simulations.engine.population import ExamplesPopulation
from simulations.simulate import simulate
from tests.helpers import small_config


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *failing: str) -> list[Any]:
    app, config = small_config("toy_regression")

    usual = ExamplesPopulation.examples

    def examples(self: ExamplesPopulation, index: int) -> Examples:
        if self.name(index) in failing:
            raise ZeroDivisionError("a defect in an application")
        return usual(self, index)

    monkeypatch.setattr(ExamplesPopulation, "examples", examples)
    config = replace(config, data=replace(config.data, holdout_fraction=0.0))
    raw = app.generate(config, 0)
    out = tmp_path / "out"
    return simulate(app, config, raw, start=None, num_rounds=2, seed=0, out=out).history


def test_one_failing_client_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = run(tmp_path, monkeypatch, "client-0001")
    assert all(r.applied and len(r.clients) == 3 for r in history)
    assert "ZeroDivisionError" in history[0].refused["client-0001"]
    check_applied(history)


def test_a_run_of_failing_clients_misses_its_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = run(tmp_path, monkeypatch, *(f"client-{i:04d}" for i in range(4)))
    assert not any(r.applied for r in history)
    with pytest.raises(GoalMissed, match="none of 2 rounds") as refused:
        check_applied(history)
    assert "ZeroDivisionError" in refused.value.remedy
