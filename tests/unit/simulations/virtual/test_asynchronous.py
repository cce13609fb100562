"""Asynchronous training on the virtual clock: who counts when, by hand; resuming; less time than rounds with stragglers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_core.algorithms.base import ClientUpdate
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import InputError
from fl_core.learning.local_update import local_update
from fl_core.learning.torch_arrays import get_arrays
from fl_server.history import RoundRecord
from simulations.simulate import Simulation, simulate
from simulations.virtual import results
from simulations.virtual.fleet import Device, DeviceClass
from tests.helpers import small_config

EXAMPLES = ("data.clients=4", "data.holdout_fraction=0", "data.examples_per_client=20", "algorithm.batch_size=4")
EXACT = (*EXAMPLES, "data.validation_fraction=0", "algorithm.local_epochs=2", "algorithm.mode=async")
MODEL = 36
FULL = MODEL / 1000 + 2 * 20 / 10 + MODEL / 500
PACES = {"client-0001": 0.5, "client-0002": 0.25}


class Paced:
    """10 examples a second, 1 kB/s down, 500 bytes/s up, no latency; slower by name."""

    def __init__(self, paces: dict[str, float]) -> None:
        self.paces = paces

    def device(self, name: str) -> Device:
        kind = DeviceClass(name="all", latency_s=0.0)
        return Device(kind=kind, examples_per_second=10.0, down_bytes_s=1000.0, up_bytes_s=500.0)

    def pace(self, name: str, round: int) -> float:
        return self.paces.get(name, 1.0)

    def drops_out(self, name: str, exchange: str) -> bool:
        return False


def run(out: Path, *overrides: str, rounds: int = 4, stop_after: int = 0, **options: Any) -> Simulation:
    app, config = small_config("toy_regression", *overrides)

    def on_round(record: RoundRecord) -> None:
        if record.round == stop_after:
            raise InterruptedError

    settings: dict[str, Any] = {"devices": Paced(PACES), "workers": 1, **options}
    return simulate(
        app, config, app.generate(config, 0), start=None, num_rounds=rounds, seed=0, out=out, on_round=on_round,
        **settings,
    )  # fmt: skip


def test_four_buffers_of_two_by_hand(tmp_path: Path) -> None:
    """c0 and c3 take 4.108 s, c1 8.108, c2 16.108; whoever is free gets the newest model."""
    found = run(tmp_path, *EXACT, "algorithm.name=fedbuff", "algorithm.buffer=2")
    c = [f"client-{i:04d}" for i in range(4)]
    assert [sorted(r.clients) for r in found.history] == [[c[0], c[3]], [c[0], c[1]], [c[0], c[3]], [c[1], c[2]]]
    assert [r.staleness for r in found.history] == [{}, {c[1]: 1}, {c[3]: 1}, {c[1]: 1, c[2]: 3}]
    times = [FULL, 2 * FULL, 3 * FULL, 2 * FULL + FULL + 4]
    assert results.seconds(found.history) == pytest.approx(times)


def test_the_model_is_the_papers_sum_over_the_models_that_clients_started_from(tmp_path: Path) -> None:
    """A plain loop over the same schedule: FedBuff written out, with the sequential local update."""
    overrides = (*EXACT, "algorithm.name=fedbuff", "algorithm.buffer=2", "algorithm.global_lr=0.7")
    found = checkpoints.load(run(tmp_path, *overrides).final).arrays
    app, config = small_config("toy_regression", *overrides)
    data = app.generate(config, 0).examples(config).by_client()
    models = {1: get_arrays(app.build_model(config))}
    for version, used in enumerate([{0: 1, 3: 1}, {0: 2, 1: 1}, {0: 3, 3: 2}, {1: 3, 2: 1}], start=1):
        change = {k: np.zeros(v.shape) for k, v in models[1].items()}
        for client, base in used.items():
            name = f"client-{client:04d}"
            result = local_update(
                app.build_model(config), app, config, data[name], reference=models[base], client_update=ClientUpdate(),
                client=name, round=base, num_rounds=4, seed=0,
            )  # fmt: skip
            for k in change:
                change[k] += (result.arrays[k] - models[base][k]) / 2 * (1 + version - base) ** -0.5
        models[version + 1] = {k: (v + 0.7 * change[k]).astype(v.dtype) for k, v in models[version].items()}
    for key, value in models[5].items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)


def test_too_old_models_are_refused_and_deadlines_give_up(tmp_path: Path) -> None:
    old = run(tmp_path / "old", *EXACT, "algorithm.name=fedasync", "algorithm.buffer=2", "algorithm.max_staleness=2")
    assert any("3 models old, at most 2 count" in reason for r in old.history for reason in r.refused.values())
    late = run(tmp_path / "late", *EXACT, "algorithm.name=fedasync", "algorithm.buffer=2", "algorithm.deadline_s=9")
    assert [r.late for r in late.history if r.late] == [["client-0002"]]
    assert all(r.applied for r in late.history)


@pytest.mark.parametrize("personal", ["[]", "['head.bias']"])
def test_an_interrupted_run_goes_on_at_the_end_of_its_last_buffer(tmp_path: Path, personal: str) -> None:
    chosen = (*EXACT, "algorithm.name=fedbuff", "algorithm.buffer=2", f"algorithm.personal={personal}")
    with pytest.raises(InterruptedError):
        run(tmp_path, *chosen, stop_after=2)
    found = run(tmp_path, *chosen, rounds=4)
    assert [r.round for r in found.history] == [1, 2, 3, 4]
    assert all(r.applied for r in found.history)
    assert found.history[2].staleness == {}, "what was under way is asked again, with the newest model"


def test_algorithms_that_need_one_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'scaffold'.*algorithm.mode = 'async'"):
        run(tmp_path, *EXACT, "algorithm.name=scaffold")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("algorithm.over_select=0.5", r"algorithm.over_select is of rounds"),
        ("algorithm.late=next", r"algorithm.late is of rounds"),
        ("algorithm.buffer=5", r"algorithm.buffer = 5: .* 4 clients train"),
    ],
)
def test_settings_that_a_stream_of_replies_cannot_have_are_refused(tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(tmp_path / "out", *EXACT, "algorithm.name=fedbuff", "algorithm.buffer=2", setting)
    assert not (tmp_path / "out").exists()


def test_with_stragglers_it_takes_less_time_to_a_target_than_rounds(tmp_path: Path) -> None:
    """Ten clients, of which two are ten times slower: rounds wait for these, buffers do not."""
    common = (
        "data.clients=12", "data.examples_per_client=40", "model.hidden=0", "algorithm.evaluate_every=1",
        "optimizer.lr=0.02", "algorithm.deadline_s=1000",
    )  # fmt: skip
    slow = Paced({"client-0004": 0.1, "client-0009": 0.1})
    sync = run(tmp_path / "sync", *common, "algorithm.name=fedavg", rounds=12, devices=slow)
    asked = ("algorithm.name=fedbuff", "algorithm.mode=async", "algorithm.buffer=4")
    stream = run(tmp_path / "async", *common, *asked, rounds=36, devices=slow)
    times = [results.time_to(found.history, "r2", 0.8, higher_is_better=True) for found in (sync, stream)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1] < times[0] / 2, times
