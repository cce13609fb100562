"""Foreground, offsets and seeds in one loss, as (numerator, denominator): a sum over tiles, so that any split of a batch adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from applications.plant_segmentation.grouping import OFFSET
from applications.plant_segmentation.pipeline import UNLABELLED

OFFSETS, SEEDS = 2.0, 1.0  # weights beside the foreground's
SMOOTH = 16.0  # pixels: keeps the Dice of a tile without plants defined


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs: (N, 4, H, W) maps; targets: (N, H, W) instance numbers. Returns (sum of the tiles' losses, N).

    Of each tile: cross-entropy and soft Dice (Milletari et al. 2016) of the foreground, the smooth L1 distance of each plant
    pixel's offset, and the squared error of the seeds.
    """
    known = targets != UNLABELLED
    inside = known & (targets > 0)
    total = foreground(outputs[:, 0], inside.to(outputs.dtype), known.to(outputs.dtype))
    if config.model.task == "instances":
        way = centre_offsets(torch.where(inside, targets, 0), outputs.dtype)
        weight = inside.to(outputs.dtype)
        distance = functional.smooth_l1_loss(outputs[:, 1:3], way / OFFSET, reduction="none", beta=0.1).sum(1)
        total = total + OFFSETS * (distance * weight).sum((1, 2)) / (weight.sum((1, 2)) + 1)
        near = torch.exp(-(way**2).sum(1) / (2 * config.model.seed_radius**2)) * weight
        error = (torch.sigmoid(outputs[:, 3]) - near) ** 2 * known
        total = total + SEEDS * error.sum((1, 2)) / (weight.sum((1, 2)) + SMOOTH)
    else:
        total = total + 0 * outputs[:, 1:].mean((1, 2, 3))  # every parameter has a gradient
    return total.sum(), outputs.new_tensor(float(len(outputs)))


def foreground(logit: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """(N,)"""
    entropy = functional.binary_cross_entropy_with_logits(logit, truth, reduction="none") * known
    likely = torch.sigmoid(logit) * known
    dice = (2 * (likely * truth).sum((1, 2)) + SMOOTH) / (likely.sum((1, 2)) + truth.sum((1, 2)) + SMOOTH)
    return entropy.sum((1, 2)) / known.sum((1, 2)).clamp(min=1) + 1 - dice


def centre_offsets(instances: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H, W) numbers -> (N, 2, H, W): from each pixel to the mean of its instance's pixels, in pixels."""
    count, height, width = instances.shape
    numbers = height * width + 1  # at most; a size that depends on the data could not be estimated beforehand
    key = (instances.long() + numbers * torch.arange(count, device=instances.device)[:, None, None]).flatten()
    grid = torch.stack(
        torch.meshgrid(
            torch.arange(height, dtype=dtype, device=instances.device),
            torch.arange(width, dtype=dtype, device=instances.device),
            indexing="ij",
        )
    )
    size = torch.zeros(count * numbers, dtype=dtype, device=instances.device).index_add_(
        0, key, torch.ones_like(key, dtype=dtype)
    )
    ways = []
    for axis in grid:
        place = axis.expand(count, height, width).reshape(-1)
        sums = torch.zeros_like(size).index_add_(0, key, place)
        ways.append(((sums / size.clamp(min=1))[key] - place).view(count, height, width))
    return torch.stack(ways, 1)
