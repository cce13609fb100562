"""Spatial parallelism: one sample's volume (or image, or series) cut along an axis over processes.

    model = split_space(model, group)
    numerator, denominator = loss(model(volume), targets)    # the whole sums, on every process
    (numerator / denominator / group_size).backward()        # then gradients are SUMMED over the group

Every process is given the whole inputs and keeps its rows of them; activations never are whole anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fl_core.contracts.errors import ConfigError
from hpc_trainer.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from hpc_trainer.spatial import elementwise, shapes, statistics, windows  # noqa: F401  (they register themselves)
from hpc_trainer.spatial.part import Part, cut, entered, left, local, whole, wrap

__all__ = ["Part", "cut", "split_space", "whole"]


def split_space(
    model: nn.Module,
    group: ProcessGroup,
    *,
    axis: int = 2,
    batch: ProcessGroup | None = None,
    samples: ProcessGroup | None = None,
) -> nn.Module:
    """The model computes on inputs cut along ``axis``, in place; inputs without such an axis stay whole.

    axis: from the front; 2 is the first behind (N, C, ...). batch: all processes that have parts of the batch, samples and
    rows (default: ``group``); samples: those of them that have the same rows as this one (default: this one alone).
    Raises ConfigError at the first forward pass, naming the layer, where an operation cannot be computed in parts.
    """
    model = synchronise_batch_norm(model, batch or group)
    for name, module in model.named_modules():
        if isinstance(module, SynchronisedBatchNorm):
            module.group = batch or group
            module.forward = functools.partial(_by_rows, module, samples, module.forward)  # type: ignore[method-assign]
        module.register_forward_pre_hook(functools.partial(_enter, name))
        module.register_forward_hook(_leave, always_call=True)
    model.register_forward_pre_hook(functools.partial(_cut_inputs, group, axis), with_kwargs=True)
    return model


def _enter(name: str, module: nn.Module, inputs: Any) -> None:
    entered(name)


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    left()


def _by_rows(
    module: SynchronisedBatchNorm, samples: ProcessGroup | None, forward: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """Synchronised batch norm gathers by itself: each process gives the rows that it has, or whole samples once."""
    if isinstance(x, Part):
        return wrap(forward(local(x)), x.placed)
    everyone, module.group = module.group, samples
    try:
        return forward(x)
    finally:
        module.group = everyone


def _cut_inputs(group: ProcessGroup, axis: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    def one(value: Any) -> Any:
        whole_volume = isinstance(value, torch.Tensor) and not isinstance(value, Part) and value.dim() > axis
        return cut(value, axis, group) if whole_volume else value

    made = tuple(map(one, args)), {k: one(v) for k, v in kwargs.items()}
    if not any(isinstance(value, Part) for value in (*made[0], *made[1].values())):
        raise ConfigError(
            f"spatial parallelism: no input of this model has an axis {axis} that could be cut",
            remedy="set pretrain.spatial_axis to one that is there, or train with data parallelism",
        )
    return made
