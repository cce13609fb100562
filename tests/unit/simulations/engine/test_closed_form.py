"""The closed form of the cross-entropy is used for that loss alone, and gives what autograd gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from simulations.engine.paths.closed_form import cross_entropy, plain_cross_entropy
from simulations.engine.paths.losses import StackedLoss


def summed(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, t, reduction="sum"), y.new_tensor(float(len(y)))


def each(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    value = functional.cross_entropy(y, t.to(torch.int64), reduction="none")
    return value.sum(), torch.tensor(float(y.shape[0]))


def mean(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, t), torch.tensor(1.0)


def smoothed(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, t, reduction="sum", label_smoothing=0.1), torch.tensor(float(len(t)))


def weighted(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    weight = torch.arange(1.0, 1.0 + y.shape[1])
    return functional.cross_entropy(y, t, weight, reduction="sum"), weight[t].sum()


def scaled(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y / 2, t, reduction="sum"), torch.tensor(float(len(t)))


def penalised(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, t, reduction="sum") + y.square().sum(), torch.tensor(float(len(t)))


def counted(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, t, reduction="sum"), (t >= 0).sum()


def moved(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, (t + 1) % 4, reduction="sum"), torch.tensor(float(len(t)))


def copied(y: Tensor, t: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(y, t, reduction="sum"), y.new_tensor(t[0])


@pytest.mark.parametrize(
    ("loss", "denominator"),
    [(summed, 5.0), (each, 5.0)]
    + [(loss, 0.0) for loss in (mean, smoothed, weighted, scaled, penalised, counted, moved, copied)],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_only_a_plain_cross_entropy_is_recognised(loss: Callable[..., Any], denominator: float) -> None:
    outputs, targets = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    assert plain_cross_entropy(loss, outputs, targets, None) == denominator


def test_it_is_the_gradient_of_each_clients_mean() -> None:
    outputs, targets = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (3, 5))
    sums, gradient = cross_entropy(outputs.detach(), targets, 5.0)
    expected = torch.stack([functional.cross_entropy(outputs[k], targets[k], reduction="sum") for k in range(3)])
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-13, atol=1e-13)
    (wanted,) = torch.autograd.grad((expected / 5).sum(), outputs)
    torch.testing.assert_close(gradient, wanted, rtol=1e-13, atol=1e-14)


def test_ignored_examples_are_left_to_the_loss_itself() -> None:
    outputs, targets = torch.randn(2 * 5, 4, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 0], [-100, 1, 2, 3, 0]])
    found = StackedLoss(summed, None)((outputs,), targets, np.array([5, 5]), several=False)
    expected = functional.cross_entropy(outputs[5:], targets[1], reduction="sum")
    assert found.numerators[1] == pytest.approx(float(expected), rel=1e-12)
    assert not found.gradients[0][5].any()
