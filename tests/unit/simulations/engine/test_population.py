"""Clients by number: lazy names, examples on demand, a million clients without a table of them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fl_core.contracts.errors import DataError
from fl_core.learning.examples import Examples
from fl_server.history import History, RoundRecord, read_history
from fl_server.selection import UniformSelector, select
from simulations.engine.population import ExamplesPopulation, GeneratedPopulation, Names
from simulations.simulate import simulate
from tests.helpers import small_config

MILLION = 1_000_000


def make(index: int) -> Examples:
    rng = np.random.default_rng(index)
    x = rng.normal(size=(8, 8)).astype(np.float32)
    ids = np.arange(8).astype(np.str_)
    columns = {"client": np.full(8, str(index)), "group": ids, "example_id": ids}
    return Examples({"features": x}, x.sum(1), columns)


def test_names_are_sorted_and_found_again() -> None:
    population = GeneratedPopulation(MILLION, make, size=8)
    names = Names(population)
    assert names[0] == "client-000000"
    assert names[-1] == "client-999999"
    assert names[3:5] == ["client-000003", "client-000004"]
    assert population.find("client-000123") == 123
    for strange in ("client-1", "client-1000000", "client-00000x", "other-000001", ""):
        assert strange not in names
    small = Names(GeneratedPopulation(12, make, size=8))
    assert list(small) == sorted(small)


def test_the_choice_of_a_round_is_that_of_a_list_of_names() -> None:
    names = Names(GeneratedPopulation(5_000, make, size=8))
    assert select(names, 20, seed=3, round=2) == select(list(names), 20, seed=3, round=2)


def test_choosing_among_a_million_makes_no_million_names() -> None:
    names = Names(GeneratedPopulation(MILLION, make, size=8))
    tracemalloc.start()
    try:
        assert len(set(UniformSelector(0).choose(names, 1_000, round=1).chosen)) == 1_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("workers", [1, 2])
def test_a_million_clients(tmp_path: Path, workers: int) -> None:
    app, config = small_config("toy_regression", "algorithm.clients_per_round=6")
    population = GeneratedPopulation(MILLION, make, size=8)
    found = simulate(app, config, population, start=None, num_rounds=2, seed=0, out=tmp_path / "out", workers=workers)
    assert len(found.clients) == MILLION
    assert all(len(r.clients) == 6 and r.applied for r in found.history)
    assert found.history[0].clients.keys() != found.history[1].clients.keys()


def test_a_population_is_not_dealt_out_anew(tmp_path: Path) -> None:
    app, config = small_config("toy_regression")
    population = GeneratedPopulation(5, make, size=8)
    with pytest.raises(DataError, match="cannot be dealt out anew"):
        simulate(app, config, population, start=None, num_rounds=1, seed=0, out=tmp_path / "out", partition="iid:2")


def test_examples_in_any_order_are_each_clients_own() -> None:
    owner = np.array(["b", "a", "b", "c", "a"])
    examples = Examples({"x": np.arange(5)}, np.arange(5), {"client": owner, "group": owner, "example_id": owner})
    population = ExamplesPopulation(examples, ["c", "b"])
    assert [population.name(i) for i in range(2)] == ["b", "c"]
    assert population.examples(0).targets.tolist() == [0, 2]
    assert population.examples(1).targets.tolist() == [3]
    assert [population.size(i) for i in range(2)] == [2, 1]
    with pytest.raises(KeyError):
        population.find("a")


def test_history_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "IN_MEMORY", 10)
    history = History(tmp_path)
    for number in (1, 2, 3, 4):
        history.append(RoundRecord(round=number, clients={f"c{i}": {"loss": 1.0} for i in range(4)}))
    history.close()
    assert [len(r.clients) for r in history.records] == [0, 0, 4, 4]
    assert [len(r.clients) for r in read_history(tmp_path)] == [4, 4, 4, 4]
    again = History(tmp_path, resumed_round=4)
    again.close()
    assert [len(r.clients) for r in again.records] == [0, 0, 4, 4]
