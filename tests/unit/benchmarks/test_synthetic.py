"""The synthetic benchmark's own parts: its local update against the sequential one, its stragglers, its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import _synthetic as synthetic
from benchmarks import synthetic as benchmark
from fl_core.algorithms.base import ClientUpdate, GradientTerms
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig
from fl_core.flower.messages import Request
from fl_core.learning.client_states import SlotStates
from fl_core.learning.local_update import local_update
from fl_server.selection import select
from simulations.virtual.grid import Work


class Terms(ClientUpdate):
    def __init__(self, terms: GradientTerms) -> None:
        self._terms = terms

    def terms(self) -> GradientTerms:
        return self._terms


@pytest.mark.parametrize("max_steps", [0, 7])
def test_the_numpy_local_update_equals_the_sequential_one(tmp_path: Path, max_steps: int) -> None:
    rng = np.random.default_rng(0)
    data = synthetic.generate(1, 1, 4)["client-03"]
    config = synthetic.Config(
        optimizer=OptimizerConfig(lr=0.01), algorithm=AlgorithmConfig(local_epochs=2, batch_size=10)
    )
    arrays = {"weight": rng.normal(size=(10, 60)).astype(np.float32), "bias": rng.normal(size=10).astype(np.float32)}
    correction = tuple(0.1 * rng.normal(size=a.shape).astype(np.float32) for a in arrays.values())
    terms = GradientTerms(proximal=0.5, correction=correction)
    request = Request(
        application="synthetic", config={}, round=3, num_rounds=5, seed=2, arrays=arrays, max_steps=max_steps
    )
    client = synthetic.SoftmaxClient("client-03", data, config, SlotStates(tmp_path, lambda name: 0))
    found = client.train(arrays, terms, request)
    expected = local_update(
        synthetic.build_model(config), synthetic.APPLICATION, config, synthetic.examples(data), reference=arrays,
        client_update=Terms(terms), client="client-03", round=3, num_rounds=5, seed=2, max_steps=max_steps,
    )  # fmt: skip
    assert found.steps == expected.steps > 6
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, rtol=1e-4, atol=1e-5)


def test_exactly_the_stragglers_of_a_round_are_slow() -> None:
    names = [f"client-{i:02d}" for i in range(30)]
    work = {name: Work(train=95, validation=0, epochs=20, batch_size=10) for name in names}
    fleet = synthetic.Stragglers(work, 0.9, 1)
    for number in range(1, 20):
        chosen = select(names, 10, seed=1, round=number)
        paces = [fleet.pace(name, number) for name in chosen]
        assert paces.count(1.0) == 1
        assert {round(20 * p) for p in paces} <= set(range(1, 21))


def test_a_cell_is_done_once_and_the_order_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = benchmark.cell(tmp_path, "partial", 4, 1)
    monkeypatch.setattr(benchmark, "federate", lambda *_: pytest.fail("done twice"))
    assert benchmark.cell(tmp_path, "partial", 4, 1) == first
    calm, wild = [0.5] * 40, [0.5, 1.5] * 20
    curves = {name: {"accuracy": [0.7] * 40, "loss": calm} for name in benchmark.ROWS}
    curves["drop"]["accuracy"], curves["proximal"]["accuracy"] = [0.6] * 40, [0.8] * 40
    curves["partial"]["loss"], curves["proximal"]["loss"] = wild, [0.5, 0.6] * 20
    curves["iid-proximal"]["loss"] = [0.9] * 40
    assert all(holds for _, holds in benchmark.orders([curves]))
    curves["iid-proximal"]["loss"], curves["proximal"]["loss"] = calm, wild
    curves["drop"]["accuracy"] = [0.75] * 40
    assert not any(holds for _, holds in benchmark.orders([curves]))
