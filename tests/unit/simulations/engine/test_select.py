"""Which path is taken: measured once, kept in a file and in the run folder; what does not fit falls back and says so."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.errors import InputError
from fl_core.flower.messages import Request
from simulations.engine import select
from simulations.engine.measure import Pace, sequential_pace
from simulations.engine.names import parsed
from simulations.engine.paths.sequential import SequentialPath
from simulations.engine.population import ExamplesPopulation
from simulations.engine.select import choose
from tests.helpers import refusal
from tests.unit.simulations.engine.test_workers import Setup

MANY = 10_000


def test_names_with_stacks() -> None:
    assert parsed("stacked:64") == ("stacked", 64)
    assert parsed("auto") == ("auto", 0)
    assert "known: auto, functional, fused, sequential, stacked" in str(refusal(InputError, lambda: parsed("magic")))
    for wrong in ("stacked:0", "stacked:x", "fused:3", "stacked:-1", "stacked:99999"):
        with pytest.raises(InputError, match="not usable"):
            parsed(wrong)


def test_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, cache = Setup("data.clients=80"), tmp_path / "cache" / "engines.json"
    first = choose("auto", setup.learner, setup.population, rounds=MANY, seed=0, cache=cache)
    assert {"sequential", "fused"} < set(first.rates)
    assert first.rates[first.shown().partition(" ")[0]] == max(first.rates.values())
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["name"] == first.name
    monkeypatch.setattr(select, "measured", lambda *args: pytest.fail("measured again"))
    again = choose("auto", setup.learner, setup.population, rounds=MANY, seed=0, cache=cache)
    assert (again.name, again.block, again.why) == (first.name, first.block, "measured before")


def test_another_training_is_measured_by_itself() -> None:
    setups = [Setup(), Setup("optimizer.momentum=0.5"), Setup("model.hidden=9"), Setup("algorithm.batch_size=5")]
    assert len({select.signature(s.learner, s.population, []) for s in setups}) == len(setups)


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    setup, kept = Setup(), tmp_path / "run" / ".engine.json"
    first = choose("stacked:3", setup.learner, setup.population, rounds=1, seed=0, kept=kept)
    assert (first.name, first.block) == ("stacked", 3)
    again = choose("auto", setup.learner, setup.population, rounds=MANY, seed=0, kept=kept)
    assert (again.name, again.block) == ("stacked", 3)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"name": "stacked", "block": 0}', '{"name": "magic", "block": 3}', "{"])
def test_a_damaged_note_of_a_run_is_chosen_again(tmp_path: Path, text: str) -> None:
    setup, kept = Setup(), tmp_path / ".engine.json"
    kept.write_text(text)
    assert choose("auto", setup.learner, setup.population, rounds=1, seed=0, kept=kept).name == "sequential"
    assert json.loads(kept.read_text())["name"] == "sequential"


def test_little_work_is_not_measured_first(tmp_path: Path) -> None:
    setup = Setup()
    found = choose("auto", setup.learner, setup.population, rounds=1, seed=0, cache=tmp_path / "engines.json")
    assert found.name == "sequential"
    assert "too little to do" in found.shown()
    assert not (tmp_path / "engines.json").exists()


def test_few_slow_clients_are_measured_on_some_of_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, asked = Setup("algorithm.batch_size=2", "algorithm.local_epochs=3"), []
    pace = sequential_pace(setup.learner, setup.population, select.usual_size(setup.population), 0)
    assert pace is not None
    assert pace.steps == 3 * math.ceil(select.usual_size(setup.population) / 2)
    monkeypatch.setattr(select, "sequential_pace", lambda *args: Pace(step_s=1.0, steps=pace.steps))
    train = SequentialPath.train

    def trained(self: SequentialPath, tasks: Any, request: Request) -> Any:
        asked.append(request.max_steps)
        return train(self, tasks, request)

    monkeypatch.setattr(SequentialPath, "train", trained)
    found = choose("auto", setup.learner, setup.population, rounds=1, seed=0, cache=tmp_path / "engines.json")
    assert "clients a second" in found.shown()
    assert asked == [2], "of clients of many seconds two steps are enough"


def test_no_client_with_examples_is_not_measured() -> None:
    setup = Setup()
    empty = setup.raw.examples(setup.config).take(slice(0, 0))
    assert sequential_pace(setup.learner, ExamplesPopulation(empty, ["a"]), 0, 0) is None


def test_what_does_not_fit_falls_back_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup("model.norm=batch")
    with caplog.at_level(logging.WARNING):
        found = choose("stacked", setup.learner, setup.population, rounds=1, seed=0)
    assert found.name == "sequential"
    assert "cannot be traced" in found.shown()
    assert len(caplog.records) == 1
    auto = choose("auto", setup.learner, setup.population, rounds=MANY, seed=0, cache=tmp_path / "engines.json")
    assert auto.name == "sequential"


def test_few_clients_of_a_model_that_only_stacks_together_train_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such are the 3-D networks, which no kernel takes: with too few clients a round for the smallest stack nothing is left to measure."""
    setup = Setup("algorithm.clients_per_round=2")
    reasons = {"fused": "no kernel for it", "functional": ""}
    monkeypatch.setattr(select, "reason_against", lambda name, *args: reasons[name])
    found = choose("auto", setup.learner, setup.population, rounds=MANY, seed=0, cache=tmp_path / "engines.json")
    assert found.name == "sequential"
    assert "no kernel for it; too few clients a round" in found.shown()


def test_a_damaged_cache_is_measured_anew(tmp_path: Path) -> None:
    setup, cache = Setup("data.clients=40"), tmp_path / "engines.json"
    cache.write_bytes(b"{ not json")
    assert choose("auto", setup.learner, setup.population, rounds=MANY, seed=0, cache=cache).rates
    assert json.loads(cache.read_text())
