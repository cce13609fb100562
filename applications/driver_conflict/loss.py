"""Binary cross-entropy as (numerator, denominator): weighted sums, so that any split of a batch adds up."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from applications.driver_conflict.config import Config


def loss(outputs: Tensor, targets: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """outputs: (N,) logits; targets: (N,) in {0, 1}. Returns (weighted sum, sum of weights)."""
    truth = targets.to(outputs.dtype)
    weight = 1.0 + (config.model.positive_weight - 1.0) * truth
    value = functional.binary_cross_entropy_with_logits(outputs, truth, weight=weight, reduction="sum")
    return value, weight.sum()
