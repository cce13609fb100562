"""Coarse-to-fine training: the first steps see volumes (or images) at a lower resolution, with the same weights.

``pretrain.coarse = "4:0.3,2:0.3"``: the first 30 % of all steps at a quarter of the edge, the next 30 % at half of it, the rest
whole. A step at half the edge of a volume costs an eighth. Fully convolutional models take every size; what is learned of large
structures on coarse grids need not be learned on fine ones (multigrid training: Balu et al., SC 2021). Inputs are means over
blocks, so are real-valued dense targets; of labels each block keeps its middle one. Validation is always at full resolution.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn

from fl_core.contracts.errors import ConfigError

Level = tuple[int, float]
REMEDY = 'write factor:share of the steps, such as "4:0.3,2:0.3", coarse levels first, shares below 1 together'


@functools.cache
def levels(text: str) -> tuple[Level, ...]:
    """(factor, share of all steps at whose end it ends), the coarsest first. Raises ConfigError."""
    found: list[Level] = []
    end = 0.0
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*([1-9][0-9]?)\s*:\s*(0?\.[0-9]+)\s*", part)
        if not match or int(match[1]) < 2 or (found and int(match[1]) >= found[-1][0]):
            raise ConfigError(f"pretrain.coarse = {text!r}: {part!r} is not a level", remedy=REMEDY)
        end += float(match[2])
        found.append((int(match[1]), end))
    if end >= 1:
        raise ConfigError(f"pretrain.coarse = {text!r} leaves no step at full resolution", remedy=REMEDY)
    return tuple(found)


def factor_at(text: str, step: int, total: int) -> int:
    """By how much edges are shortened in ``step`` of ``total``, counted from 0."""
    return next((factor for factor, end in levels(text) if step < end * total), 1)


def coarsened(inputs: tuple[Tensor, ...], targets: Tensor, factor: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """inputs: (N, C, ...) each with its own spatial axes, or without any; targets: dense (N, [C,] ...) or one an example."""
    if factor == 1:
        return inputs, targets
    spatial = max((x.shape[2:] for x in inputs), key=len)
    dense = len(spatial) > 0 and targets.shape[-len(spatial) :] == spatial
    small = tuple(_blocks(x, x.dim() - 2, factor) for x in inputs)
    return small, _blocks(targets, len(spatial), factor) if dense else targets


def _blocks(x: Tensor, axes: int, factor: int) -> Tensor:
    if axes < 1:
        return x
    if odd := [n for n in x.shape[-axes:] if n % factor]:
        raise ConfigError(
            f"pretrain.coarse: an edge of {odd[0]} is not a multiple of {factor}",
            remedy="choose other factors, or another size of the data",
        )
    if not x.is_floating_point():
        for axis in range(x.dim() - axes, x.dim()):
            x = x.index_select(axis, torch.arange(factor // 2, x.shape[axis], factor, device=x.device))
        return x
    lead = x.shape[:-axes]
    split = [part for n in x.shape[-axes:] for part in (n // factor, factor)]
    inner = tuple(range(len(lead) + 1, len(lead) + 2 * axes, 2))
    return x.reshape(*lead, *split).mean(dim=inner)


def refuse_what_is_too_coarse(model: nn.Module, example: tuple[Tensor, ...], config: Any) -> None:
    """One sample through the model at each level, before training. Raises ConfigError."""
    for factor, _ in levels(config.pretrain.coarse):
        inputs, _ = coarsened(example, example[0], factor)
        if all(a.shape == b.shape for a, b in zip(inputs, example, strict=True)):
            raise ConfigError("pretrain.coarse: the inputs of this model have no spatial axes", remedy="set it to ''")
        training = model.training
        try:
            with torch.no_grad():
                model.eval()(*(x[:1] for x in inputs))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"pretrain.coarse: the model does not take inputs of {list(inputs[0].shape[2:])} (a factor of {factor}): {error}",
                remedy="choose smaller factors",
            ) from error
        finally:
            model.train(training)
