"""Normalisation layers by name: ``model.norm = batch|group|none`` of every application."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from fl_core.contracts.errors import unknown_name


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
    raise unknown_name("normalisation", kind, ["batch", "group", "none"])
