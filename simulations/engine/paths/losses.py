"""An application's loss for K clients' batches at once: each client's own mean, and its gradient at the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simulations.engine.paths.closed_form import cross_entropy, plain_cross_entropy

Floats = npt.NDArray[np.float64]


@dataclass
class Found:
    """numerators, denominators: (K,); gradients: of each output, (K B, ...), zero where a batch was filled up."""

    numerators: Floats
    denominators: Floats
    gradients: list[Tensor]


class StackedLoss:
    """loss(outputs, targets, config) -> (numerator, denominator), mapped over clients; what has no batching rule is
    called for one client after the other, and what is a plain cross-entropy is computed in closed form.
    """

    def __init__(self, loss: Callable[..., Any], config: Any) -> None:
        self._loss, self._config, self._maps = loss, config, True
        self._plain: dict[tuple[Any, ...], float] = {}  # shapes and types of a batch -> constant denominator, or 0

    def __call__(
        self, outputs: Sequence[Tensor], targets: Tensor, sizes: npt.NDArray[np.int64], *, several: bool
    ) -> Found:
        """outputs: (K B, ...) each; targets: (K, B, ...); sizes: (K,) examples that count. several: the model returns a tuple."""
        count, width = targets.shape[:2]
        shaped = [y.view(count, width, *y.shape[1:]) for y in outputs]
        if (sizes == width).all():
            numerators, denominators, gradients = self._same(shaped, targets, several)
        else:
            gradients = [torch.zeros_like(y) for y in shaped]
            numerators, denominators = targets.new_zeros(count, dtype=torch.float64), torch.zeros(count).double()
            for size in np.unique(sizes):
                rows = torch.from_numpy(np.flatnonzero(sizes == size))
                part = [y[rows, :size] for y in shaped]
                n, d, g = self._same(part, targets[rows, :size], several)
                numerators[rows], denominators[rows] = n.double(), d.double()
                for whole, one in zip(gradients, g, strict=True):
                    whole[rows, :size] = one
        flat = [g.reshape(y.shape) for g, y in zip(gradients, outputs, strict=True)]
        return Found(numerators.double().cpu().numpy(), denominators.double().cpu().numpy(), flat)

    def _same(
        self, outputs: Sequence[Tensor], targets: Tensor, several: bool
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        if not several and (denominator := self._denominator(outputs[0], targets)):
            sums, gradient = cross_entropy(outputs[0], targets, denominator)
            return sums, torch.full_like(sums, denominator), [gradient]
        leaves = [y.detach().requires_grad_() for y in outputs]
        with torch.enable_grad():
            numerators, denominators = self._values(leaves, targets, several)
            gradients = torch.autograd.grad((numerators / denominators).sum(), leaves)
        return numerators.detach(), denominators.detach(), gradients

    def denominators(self, outputs: Tensor, targets: Tensor, sizes: npt.NDArray[np.int64]) -> Floats | None:
        """By size of batch, of a plain cross-entropy over all of these; None where it is not one. outputs: (B, C), and
        targets: (B,), for the largest of ``sizes``.
        """
        found = np.zeros(int(sizes.max()) + 1)
        for size in np.unique(sizes).tolist():
            found[size] = self._denominator(outputs[None, :size], targets[None, :size])
        return found if found[np.unique(sizes)].all() else None

    def _denominator(self, outputs: Tensor, targets: Tensor) -> float:
        """Of every client, where the loss is a plain cross-entropy; 0 where it is not, or where an example is ignored."""
        shape = (*outputs.shape[1:], outputs.dtype, *targets.shape[1:], targets.dtype)
        if shape not in self._plain:
            self._plain[shape] = plain_cross_entropy(self._loss, outputs[0], targets[0], self._config)
        found = self._plain[shape]
        return found if found and int(targets.min()) >= 0 else 0.0

    def _values(self, outputs: Sequence[Tensor], targets: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        def one(ys: tuple[Tensor, ...], truth: Tensor) -> tuple[Tensor, Tensor]:
            numerator, denominator = self._loss(ys if several else ys[0], truth, self._config)
            return numerator, denominator

        if self._maps and len(targets) > 1:
            try:
                found: tuple[Tensor, Tensor] = torch.func.vmap(one)(tuple(outputs), targets)
                return found
            except RuntimeError:  # data-dependent control flow, .item(): no batching rule
                self._maps = False
        each = [one(tuple(y[k] for y in outputs), targets[k]) for k in range(len(targets))]
        return torch.stack([n for n, _ in each]), torch.stack([d for _, d in each])
