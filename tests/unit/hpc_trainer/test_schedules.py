"""Properties of every learning-rate schedule."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.sections import PretrainConfig
from hpc_trainer.schedules import batch_scale, learning_rate, warmup_steps

KINDS = ("constant", "cosine", "polynomial")
configs = st.builds(
    PretrainConfig,
    schedule=st.sampled_from(KINDS),
    warmup_fraction=st.floats(0, 0.9),
    warmup_steps=st.one_of(st.just(0), st.integers(1, 400)),
    power=st.floats(0, 10),
    batch_size=st.integers(1, 10_000),
    lr_batch_size=st.one_of(st.just(0), st.integers(1, 10_000)),
    lr_scaling=st.sampled_from(["linear", "sqrt"]),
)


@given(configs, st.floats(1e-6, 10), st.integers(1, 300))
def test_rates_rise_to_their_peak_and_never_rise_again(config: PretrainConfig, base: float, total: int) -> None:
    rates = [learning_rate(config, base, step, total) for step in range(total)]
    peak = base * batch_scale(config)
    warmup = warmup_steps(config, total)
    assert all(0 <= r <= peak * (1 + 1e-12) for r in rates)
    assert max(rates) == pytest.approx(peak)
    assert all(b > a for a, b in itertools.pairwise(rates[:warmup]))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates[warmup:]))


@pytest.mark.parametrize(("total", "expected"), [(10_000, 500), (7_000, 360), (1_000, 360), (600, 300), (1, 0)])
def test_warm_up_has_its_least_steps_where_there_are_as_many(total: int, expected: int) -> None:
    assert warmup_steps(PretrainConfig(warmup_fraction=0.05, warmup_steps=360), total) == expected
    assert warmup_steps(PretrainConfig(warmup_fraction=0.05), total) == int(0.05 * total)


@given(configs, st.floats(1e-6, 10), st.integers(1, 300), st.integers(0, 299))
def test_rates_are_proportional_to_the_base(config: PretrainConfig, base: float, total: int, step: int) -> None:
    step = min(step, total - 1)
    one, two = (learning_rate(config, b, step, total) for b in (base, 2 * base))
    assert two == pytest.approx(2 * one)


@pytest.mark.parametrize(("kind", "power", "middle"), [("cosine", 1, 0.5), ("polynomial", 1, 0.5), ("polynomial", 2, 0.25), ("constant", 1, 1.0)])  # fmt: skip
def test_half_way(kind: str, power: float, middle: float) -> None:
    config = PretrainConfig(schedule=kind, power=power, warmup_fraction=0.0)
    assert learning_rate(config, 1.0, 50, 100) == pytest.approx(middle)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_scaling_by_the_batch(batch: int, meant: int) -> None:
    linear = batch_scale(PretrainConfig(batch_size=batch, lr_batch_size=meant))
    assert linear == pytest.approx(batch / meant)
    root = batch_scale(PretrainConfig(batch_size=batch, lr_batch_size=meant, lr_scaling="sqrt"))
    assert root == pytest.approx(math.sqrt(batch / meant))
    assert batch_scale(PretrainConfig(batch_size=batch)) == 1.0
