"""The statistics head: equal to the pooled solution in one round, whatever each client holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from fl_core.algorithms import statistics_head as head
from fl_core.algorithms.base import Update
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import ConfigError, InputError, IntegrityError
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import get_arrays, predict, set_arrays, tensors
from simulations.simulate import simulate
from tests.helpers import small_config

Array = npt.NDArray[Any]
CONFIG = AlgorithmConfig(name="statistics_head", head_shrinkage=0.0)


def classes(seed: int, count: int = 120) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(3), rng.integers(0, 3, count - 3)])
    x = rng.normal(size=(count, 4)) @ rng.normal(size=(4, 4)) + rng.normal(0, 2, (3, 4))[y]
    return x, y


def sums_of(x: Array, y: Array, rule: str = "discriminant", outputs: int = 3) -> dict[str, Array]:
    found = head.zeros((outputs, x.shape[1]), rule)
    head.add_examples(found, x, y)
    return found


def test_the_discriminant_is_scikit_learns() -> None:
    x, y = classes(0)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    weight, bias = head.solve(sums_of(x, y), dataclasses.replace(CONFIG, head_prior="counts"))
    ours, expected = x @ weight.T + bias, theirs.decision_function(x)
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-8
    )


def test_least_squares_are_scikit_learns_ridge() -> None:
    x, _ = classes(1)
    y = np.random.default_rng(2).normal(size=len(x))
    config = AlgorithmConfig(head_rule="least_squares", head_shrinkage=0.0)
    weight, bias = head.solve(sums_of(x, y, "least_squares", 1), config)
    theirs = Ridge(alpha=0.0).fit(x, y)
    np.testing.assert_allclose(weight[0], theirs.coef_, atol=1e-9)
    assert bias[0] == pytest.approx(theirs.intercept_)


def test_whitening_gives_the_mahalanobis_distance() -> None:
    x, y = classes(3)
    weight, bias = head.solve(sums_of(x, y, "whitening", 4), AlgorithmConfig(head_rule="whitening", head_shrinkage=0.0))
    off = x - x.mean(0)
    expected = np.einsum("ni,ij,nj->n", off, np.linalg.inv(np.cov(x.T, bias=True)), off)
    np.testing.assert_allclose(((x @ weight.T + bias) ** 2).sum(1), expected, rtol=1e-9)
    triangular = np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True)))
    np.testing.assert_allclose(weight, triangular, atol=1e-9 * np.abs(triangular).max())


@given(seed=st.integers(0, 2**31), clients=st.integers(1, 9), skewed=st.booleans())
def test_any_split_over_clients_gives_the_pooled_layer(seed: int, clients: int, skewed: bool) -> None:
    x, y = classes(seed)
    owner = y % clients if skewed else np.random.default_rng(seed).integers(0, clients, len(y))
    reference = {"head.weight": np.zeros((3, 4), np.float32), "head.bias": np.zeros(3, np.float32)}
    found = head.HeadAggregator(CONFIG)
    state = found.begin(1, reference)
    for k in range(clients):
        if (owner == k).any():
            mine = sums_of(x[owner == k], y[owner == k])
            found.screen(mine, reference, origin="van")
            found.add(state, Update(arrays=reference, weight=float((owner == k).sum()), extra=mine))
    result, (weight, bias) = found.finish(state), head.solve(sums_of(x, y), CONFIG)
    np.testing.assert_allclose(result["head.weight"], weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["head.bias"], bias, rtol=1e-5, atol=1e-5)


def test_what_clients_of_one_class_differ_in_is_avoided() -> None:
    """Three places shift a direction that tells the classes apart in training by accident; sums against a sequential twin."""
    rng = np.random.default_rng(5)
    y = rng.integers(0, 3, 600)
    client = np.where(rng.random(600) < 0.8, y, rng.integers(0, 3, 600))  # the place says much about the class
    x = rng.normal(size=(600, 4)) + np.eye(4)[y] + 8 * np.eye(4)[3] * client[:, None]
    config = AlgorithmConfig(name="statistics_head", head_shrinkage=0.0, head_invariance=50.0)
    reference = {"head.weight": np.zeros((3, 4), np.float32), "head.bias": np.zeros(3, np.float32)}
    found = head.HeadAggregator(config)
    state = found.begin(1, reference)
    for k in range(3):
        mine = sums_of(x[client == k], y[client == k])
        mine[head.OWN] = head.between(mine)
        found.screen(mine, reference, origin="van")
        found.add(state, Update(arrays=reference, weight=float((client == k).sum()), extra=mine))
    result = found.finish(state)
    nuisance = np.zeros((4, 4))
    for c in range(3):
        for k in range(3):
            chosen = x[(y == c) & (client == k)]
            away = chosen.mean(0) - x[y == c].mean(0)
            nuisance += len(chosen) * np.outer(away, away)
    sums = sums_of(x, y)
    sums[head.OWN] = nuisance + head.between(sums)
    weight, bias = head.solve(sums, config)
    np.testing.assert_allclose(result["head.weight"], weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result["head.bias"], bias, rtol=1e-4, atol=1e-5)
    without, _ = head.solve(sums_of(x, y), config)
    assert np.abs(weight[:, 3]).max() < 0.02 * np.abs(without[:, 3]).max()
    elsewhere = rng.normal(size=(300, 4)) + np.eye(4)[np.arange(300) % 3] - 40 * np.eye(4)[3]  # a place never seen
    assert ((elsewhere @ weight.T + bias).argmax(1) == np.arange(300) % 3).mean() > 0.5
    with pytest.raises(IntegrityError, match="own"):
        found.screen({**sums_of(x, y), head.OWN: -np.eye(4)}, reference, origin="van")


def test_a_class_without_examples_is_never_chosen() -> None:
    x, y = classes(4)
    weight, bias = head.solve(sums_of(x[y < 2], y[y < 2]), CONFIG)
    assert np.isfinite(weight).all()
    assert ((x[y < 2] @ weight.T + bias).argmax(1) < 2).all()


def test_clients_send_what_the_discriminant_avoids(tmp_path: Path) -> None:
    """Through the engine, against sums made by hand."""
    app, config = small_config(
        "plant_disease", "algorithm.name=statistics_head", "algorithm.head_invariance=3", "data.images_per_client=16",
        "data.validation_fraction=0.0", "data.holdout_fraction=0.0", "algorithm.evaluate_every=0", "model.width=8",
    )  # fmt: skip
    raw = app.generate(config, 0)
    examples = raw.examples(config)
    torch.set_num_threads(1)
    run = simulate(app, config, raw, start=None, num_rounds=1, seed=0, out=tmp_path / "a")
    model = app.build_model(config).eval()
    outputs, features = model.head.weight.shape  # type: ignore[union-attr]
    total = head.zeros((outputs, features), "discriminant")
    total[head.OWN] = np.zeros((features, features))
    for client in examples.clients():
        part = client_data(examples.of_clients([client]), client, 0.0, 0).train
        mine = head.zeros((outputs, features), "discriminant")
        with torch.inference_mode():
            x = model.features(tensors(app, config, part)[0])  # type: ignore[operator]
        head.add_examples(mine, x.double().numpy(), part.targets)
        for name, value in {**mine, head.OWN: head.between(mine)}.items():
            total[name] += value
    weight, _ = head.solve(total, config.algorithm)
    found = checkpoints.load(run.final).arrays["head.weight"]
    np.testing.assert_allclose(found, weight, rtol=1e-3, atol=1e-3 * np.abs(weight).max())


def test_one_round_over_extreme_label_skew_equals_pooled(tmp_path: Path) -> None:
    """Through the engine: plant_disease, one class a client; the other arrays keep their bits."""
    app, config = small_config(
        "plant_disease", "algorithm.name=statistics_head", "data.images_per_client=16", "data.validation_fraction=0.0",
        "data.holdout_fraction=0.0", "algorithm.evaluate_every=0", "model.width=8",
    )  # fmt: skip
    raw = app.generate(config, 0)
    examples = raw.examples(config)
    torch.set_num_threads(1)
    found = checkpoints.load(
        simulate(app, config, raw, start=None, num_rounds=1, seed=0, out=tmp_path / "a").final
    ).arrays
    model = app.build_model(config)
    reference = get_arrays(model)
    data = [client_data(examples.of_clients([c]), c, 0.0, 0).train for c in examples.clients()]
    sums = head.zeros(reference["head.weight"].shape, "discriminant")
    model.eval()
    with torch.inference_mode():
        for part in data:
            x = model.features(tensors(app, config, part)[0])  # type: ignore[operator]
            head.add_examples(sums, x.double().numpy(), part.targets)
    weight, bias = head.solve(sums, config.algorithm)
    np.testing.assert_allclose(found["head.weight"], weight, rtol=2e-4, atol=2e-4 * np.abs(weight).max())
    np.testing.assert_allclose(found["head.bias"], bias, rtol=2e-4, atol=2e-4 * np.abs(bias).max())
    for name in set(reference) - {"head.weight", "head.bias"}:
        np.testing.assert_array_equal(found[name], reference[name])
    set_arrays(model, found, origin="the round")
    outputs = predict(model, app, config, examples)
    chance = np.bincount(examples.targets).max() / len(examples)
    assert app.metrics(config, outputs, examples)["accuracy"] > chance + 0.2


def test_what_cannot_be_solved_is_refused_by_name() -> None:
    two = {f"{n}.{k}": np.zeros((3, 3) if k == "weight" else 3) for n in ("a", "b") for k in ("weight", "bias")}
    with pytest.raises(ConfigError, match="known: a, b"):
        head.head_of(two, "")
    assert head.head_of(two, "b") == ("b.weight", "b.bias")
    flat = {"head.weight": np.zeros((3, 4), np.float32), "head.bias": np.zeros(3, np.float32)}
    with pytest.raises(ConfigError, match="square layer"):
        head.HeadAggregator(AlgorithmConfig(head_rule="whitening")).expected(flat)
    for rule, outputs in (("least_squares", 3), ("discriminant", 1)):
        odd = {"head.weight": np.zeros((outputs, 4), np.float32), "head.bias": np.zeros(outputs, np.float32)}
        with pytest.raises(ConfigError, match="head_invariance"):
            head.HeadAggregator(AlgorithmConfig(head_rule=rule, head_invariance=1.0)).expected(odd)
    with pytest.raises(InputError, match="no classes from 0 to 2"):
        head.add_examples(head.zeros((3, 4), "discriminant"), np.zeros((2, 4)), np.array([0, 3]))
    good = sums_of(*classes(5))
    for key, value, words in (
        ("count", np.array(-1.0), "out of range"),
        ("targets", np.array([1.0, -2.0, 1.0]), "less than no examples"),
        ("moment", -np.eye(4), "no sum of squares"),
    ):
        with pytest.raises(IntegrityError, match=words):
            head.HeadAggregator(CONFIG).screen({**good, key: value}, flat, origin="van")
