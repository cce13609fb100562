"""Normalisation layers by name: ``model.norm = batch|group|ghost|none`` of every application."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fl_core.contracts.errors import unknown_name
from fl_core.contracts.sections import NORMS
from fl_core.learning.micro_batch import current

GHOST_BATCH = 8  # samples; part of the model's definition, so that a model means the same wherever it is trained


def _one_value_too(
    layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor, usual: Callable[..., Tensor]
) -> Tensor:
    """One value a channel has no variance: torch refuses it in training, but a client's last batch may hold one example.

    Such a batch is normalised with the running statistics, and leaves them as they are.
    """
    if layer.training and x.numel() == x.shape[1]:
        return functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False, eps=layer.eps
        )
    return usual(x)


class BatchNorm1d(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return _one_value_too(self, input, super().forward)


class BatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return _one_value_too(self, input, super().forward)


class BatchNorm3d(nn.BatchNorm3d):
    def forward(self, input: Tensor) -> Tensor:
        return _one_value_too(self, input, super().forward)


class GhostBatchNorm(_BatchNorm):
    """Ghost batch normalisation (Hoffer, Hubara & Soudry 2017): each GHOST_BATCH consecutive samples on their own.

    The noise of small batches at any batch size. A batch's last ghost batch may be smaller. The running statistics move
    once a batch, by the mean of the ghost batches' means and unbiased variances, weighted by their samples.
    ``deferred``: they wait in ``pending`` (sum of weighted means, of weighted variances, weight) for ``settle``, so that a
    trainer can first add up several processes and micro-batches, each of whole ghost batches.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.deferred = False
        self.pending: Tensor | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self._by_running_statistics(input)
        counted = current().real
        real = len(input) if counted is None else counted
        parts = [self._normalise(part) for part in input[:real].split(GHOST_BATCH) if len(part)]
        parts += [self._by_running_statistics(input[real:])] if len(input) > real else []
        if not self.deferred:
            self.settle()
        return torch.cat(parts) if parts else input

    def _by_running_statistics(self, input: Tensor) -> Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _normalise(self, part: Tensor) -> Tensor:
        if part.numel() == part.shape[1]:  # no variance: the rule of ``_one_value_too``
            return self._by_running_statistics(part)
        facts = self.weight.detach().new_zeros(2, part.shape[1])
        made = functional.batch_norm(part, facts[0], facts[1], self.weight, self.bias, True, 1.0, self.eps)
        if not current().recomputed:
            found = torch.cat(
                [facts.flatten().double() * len(part), facts.new_tensor([len(part)], dtype=torch.float64)]
            )
            self.pending = found if self.pending is None else self.pending + found
        return made

    def settle(self) -> None:
        """Move the running statistics by what is pending; nothing where no ghost batch had a variance."""
        pending, self.pending = self.pending, None
        if pending is None or float(pending[-1]) == 0:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, var = (pending[:-1] / pending[-1]).view(2, -1).to(self.running_mean.dtype)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked + 1)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)
        self.num_batches_tracked.add_(1)


def norm(kind: str, channels: int, *, dims: int, groups: int = 8) -> nn.Module:
    """A normalisation of ``channels`` over (N, C, ...) with ``dims`` spatial dimensions (1 covers (N, C) too).

    Group norm (Wu & He 2018) takes the largest number of groups up to ``groups`` that divides the channels and
    leaves at least two in each: one channel a group would wipe out the values of (N, C).
    """
    if kind == "none":
        return nn.Identity()
    if kind == "group":
        fitting = [g for g in range(1, groups + 1) if channels % g == 0 and channels // g >= 2]
        return nn.GroupNorm(max(fitting, default=1), channels)
    if kind == "batch":
        return {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}[dims](channels)
    if kind == "ghost":
        return GhostBatchNorm(channels)
    raise unknown_name("normalisation", kind, list(NORMS))
