"""Cross-entropy as (numerator, denominator): weighted sums over images, so that any split of a batch adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs: (N, K) logits; targets: (N,) class numbers. Returns (weighted sum, sum of weights).

    Label smoothing after Szegedy et al. (CVPR 2016).
    """
    truth = targets.to(torch.int64)
    value = functional.cross_entropy(outputs, truth, reduction="none", label_smoothing=config.model.label_smoothing)
    weights = config.model.class_weights or (1.0,) * outputs.shape[1]
    weight = torch.tensor(weights, dtype=outputs.dtype, device=outputs.device)[truth]
    return (value * weight).sum(), weight.sum()
