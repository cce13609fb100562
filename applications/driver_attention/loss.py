"""Two cross-entropies as (numerator, denominator): sums over clips, so that any split of a batch adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from applications.driver_attention.pipeline import CONFLICT, STATE


def loss(outputs: tuple[Tensor, ...], targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs: (N,) logits of the conflict, (N, 3) of the state, in training (N,) of the conflict by the kinematics alone;
    targets: (N, 2), NaN = not known, which costs nothing.

    Returns (weighted sum, N): what is not known still counts in the denominator, so that it is never zero.
    """
    conflict, state, *by_motion = outputs
    truth = targets.to(conflict.dtype)
    known = ~torch.isnan(truth)
    truth = torch.where(known, truth, torch.zeros_like(truth))
    binary = functional.binary_cross_entropy_with_logits(conflict, truth[:, CONFLICT], reduction="none")
    for logit in by_motion:
        alone = functional.binary_cross_entropy_with_logits(logit, truth[:, CONFLICT], reduction="none")
        binary = binary + config.model.motion_weight * alone
    chance = torch.log_softmax(state, dim=1)
    which = torch.arange(state.shape[1], device=state.device, dtype=truth.dtype) == truth[:, STATE, None]
    several = -(chance * which).sum(dim=1)
    value = binary * known[:, CONFLICT] + config.model.state_weight * several * known[:, STATE]
    return value.sum(), truth[:, CONFLICT].new_ones(len(truth)).sum()
