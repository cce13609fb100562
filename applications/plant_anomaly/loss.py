"""Reconstruction of the healthy plant and the heat of its lesions, as (numerator, denominator): a sum over images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from applications.plant_anomaly.pipeline import UNKNOWN

HEAT = 2.0  # weight beside the reconstruction's
RARE = 8.0  # weight of a lesion's pixel beside a healthy one: lesions cover few
SMOOTH = 4.0  # pixels: keeps the Dice of an image without lesions defined


def loss(outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs: reconstruction (N, 3, S, S), heat (N, 1, S, S), latent; targets: (N, S, S, 4) image and lesions.

    Returns (sum of the images' losses, N): mean absolute error of the pixels and of their differences to the right and
    below, and cross-entropy with soft Dice of the heat. The latent's whitening is not learned by gradients.
    """
    reconstruction, heat, _ = outputs
    image = targets[..., :3].permute(0, 3, 1, 2).to(heat.dtype) * (1 / 64) - 2
    error = reconstruction - image
    total = error.abs().mean((1, 2, 3))
    for axis in (2, 3):
        total = total + 0.5 * torch.diff(error, dim=axis).abs().mean((1, 2, 3))
    lesion = targets[..., 3]
    known = (lesion != UNKNOWN).to(heat.dtype)
    truth = (lesion == 1).to(heat.dtype)
    logit = heat[:, 0]
    entropy = (
        functional.binary_cross_entropy_with_logits(logit, truth, reduction="none") * known * (1 + (RARE - 1) * truth)
    )
    likely = torch.sigmoid(logit) * known
    dice = (2 * (likely * truth).sum((1, 2)) + SMOOTH) / (likely.sum((1, 2)) + truth.sum((1, 2)) + SMOOTH)
    total = total + HEAT * (entropy.sum((1, 2)) / known.sum((1, 2)).clamp(min=1) + (1 - dice) * known.amax((1, 2)))
    return total.sum(), heat.new_tensor(float(len(heat)))
