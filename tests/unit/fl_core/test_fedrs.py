"""FedRS: what the loss is given of absent classes' scores, and what that does to their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fl_clients.training.local_round import SharedOnly
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import ClientUpdate, LocalStart
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.learning.local_update import local_update
from fl_core.learning.torch_arrays import get_arrays, tensors
from tests.helpers import small_config

START = LocalStart(parameters=(), reference={})


def update(**settings: Any) -> ClientUpdate:
    return build_algorithm(AlgorithmConfig(name="fedrs", **settings)).client_update.begin(START)


def trained(name: str, restriction: float) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """(before, after, absent classes) of one client's local update by plain SGD."""
    torch.set_num_threads(1)
    app, config = small_config(
        *("plant_disease", "optimizer.name=sgd", "optimizer.weight_decay=0", "optimizer.lr=0.05", "data.clients=3"),
        *("model.label_smoothing=0", f"algorithm.name={name}", f"algorithm.restriction={restriction}"),
    )
    data = app.generate(config, 0).examples(config)
    data = data.take(np.flatnonzero(data.targets < 2))
    model = app.build_model(config)
    before = get_arrays(model)
    result = local_update(
        model, app, config, data, reference=before, client_update=build_algorithm(config.algorithm).client_update.begin(START),
        client="a", round=1, num_rounds=1, seed=0,
    )  # fmt: skip
    return before, result.arrays, [2, 3]


def test_scores_of_absent_classes_are_multiplied() -> None:
    found = update(restriction=0.25)
    found.prepare(np.array([3, 1, 1]))
    scores = torch.arange(8.0).view(2, 4)
    expected = scores * torch.tensor([0.25, 1.0, 0.25, 1.0])
    assert torch.equal(found.restrict(scores), expected)
    assert torch.equal(SharedOnly(found, [False]).restrict(scores), expected)
    assert found.terms() is None, "no faster path knows of it"


def test_the_gradient_is_that_of_the_restricted_cross_entropy() -> None:
    app, config = small_config("plant_disease", "model.label_smoothing=0")
    data = app.generate(config, 0).examples(config)
    data = data.take(np.flatnonzero(data.targets < 2)[:6])
    found, model = update(restriction=0.5), app.build_model(config).double()
    found.prepare(data.targets)
    scores = model(*tensors(app, config, data))
    targets = torch.from_numpy(data.targets)
    numerator, denominator = app.loss_function()(found.restrict(scores), targets, config)
    expected = functional.cross_entropy(scores * torch.tensor([1, 1, 0.5, 0.5]), targets)
    ours, theirs = (
        torch.autograd.grad(x, model.head.weight, retain_graph=True)[0] for x in (numerator / denominator, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_absent_classes_are_left_alone_or_treated_as_by_fedavg() -> None:
    before, after, absent = trained("fedrs", 0.0)
    assert (after["head.weight"][absent] == before["head.weight"][absent]).all()
    assert (after["head.weight"][:2] != before["head.weight"][:2]).any()
    _, plain, _ = trained("fedavg", 0.5)
    _, whole, _ = trained("fedrs", 1.0)
    assert all((plain[k] == whole[k]).all() for k in plain)


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(InputError, match=r"for classifiers: targets float32\[3\]"):
        update().prepare(np.zeros(3, np.float32))
    with pytest.raises(InputError, match="below 0"):
        update().prepare(np.array([0, -1]))
    found = update()
    found.prepare(np.array([0, 3]))
    with pytest.raises(InputError, match="above 2"):
        found.restrict(torch.zeros(2, 3))
    with pytest.raises(InputError, match="a score a class"):
        found.restrict((torch.zeros(2, 2), torch.zeros(2)))
