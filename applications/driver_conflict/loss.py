"""Two cross-entropies as (numerator, denominator): weighted sums, so that any split of a batch adds up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from applications.driver_conflict.config import Config
from applications.driver_conflict.pipeline import FIRST_INCIDENT, INCIDENT_SHARES


def loss(outputs: tuple[Tensor, Tensor], targets: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """outputs: (N,) logits of a conflict, (N, 5) of its kind; targets: (N,) as ``pipeline.LABELS``.

    Returns (weighted sum, sum of the conflict's weights). The kind costs only where there is a conflict of a known one; its
    logits are trained beside the logarithms of the kinds' shares (logit adjustment: Menon et al., ICLR 2021), a constant, so
    that clients with few kinds pull the model as little as any.
    """
    logit, incident = outputs
    m = config.model
    truth = (targets > 0).to(logit.dtype)
    weight = 1.0 + (m.positive_weight - 1.0) * truth
    smooth = truth * (1.0 - m.label_smoothing) + 0.5 * m.label_smoothing
    binary = functional.binary_cross_entropy_with_logits(logit, smooth, weight=weight, reduction="sum")
    kinds = torch.arange(incident.shape[1], device=targets.device) == (targets - FIRST_INCIDENT).unsqueeze(1)
    shares = torch.tensor(INCIDENT_SHARES, dtype=incident.dtype, device=incident.device)
    several = -(torch.log_softmax(incident + m.incident_balance * shares.log(), dim=1) * kinds).sum()
    return binary + m.incident_weight * several, weight.sum()
