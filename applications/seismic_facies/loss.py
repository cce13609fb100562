"""Cross-entropy as (numerator, denominator): weighted sums over labelled voxels, so that any split of a batch adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from applications.seismic_facies.pipeline import UNLABELLED


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs: (N, K, D, H, W) logits; targets: (N, D, H, W) class numbers, 255 = no label, which counts nothing.

    Returns (sum of weight x cross-entropy, sum of weights): ``model.class_weights`` lift rare classes.
    """
    truth = targets.to(torch.int64)
    labelled = truth != UNLABELLED
    truth = torch.where(labelled, truth, 0)
    weights = config.model.class_weights or (1.0,) * outputs.shape[1]
    weight = torch.tensor(weights, dtype=outputs.dtype, device=outputs.device)[truth] * labelled
    value = functional.cross_entropy(outputs, truth, reduction="none")
    return (value * weight).sum(), weight.sum()
