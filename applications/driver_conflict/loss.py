"""Two cross-entropies as (numerator, denominator): weighted sums, so that any split of a batch adds up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from applications.driver_conflict.config import Config
from applications.driver_conflict.pipeline import FIRST_INCIDENT, INCIDENT_SHARES
from fl_core.learning import seeding


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
    several = -(torch.log_softmax(_adjusted(incident, config), dim=1) * kinds).sum()
    return binary + m.incident_weight * several, weight.sum()


def _adjusted(incident: Tensor, config: Config) -> Tensor:
    shares = torch.tensor(INCIDENT_SHARES, dtype=incident.dtype, device=incident.device)
    return incident + config.model.incident_balance * shares.log()


def sample(outputs: tuple[Tensor, Tensor], keys: npt.NDArray[np.uint64], config: Config) -> Tensor:
    """(N,) targets drawn from what the logits say, less the weight and smoothing of the loss.

    A conflict has the probability at which the expected gradient of its weighted, smoothed cross-entropy is zero.
    """
    logit, incident = outputs
    m = config.model
    likely = torch.sigmoid(logit)
    low, high = 0.5 * m.label_smoothing, 1 - 0.5 * m.label_smoothing
    against, towards = (likely - low).clamp(min=0), m.positive_weight * (high - likely).clamp(min=0)
    chance = against / (against + towards)
    first, second = (torch.from_numpy(seeding.uniform(keys, stream)).to(logit) for stream in (0, 1))
    total = torch.softmax(_adjusted(incident, config), dim=1).cumsum(dim=1)
    kind = (second.unsqueeze(1) >= total[:, :-1]).sum(dim=1)
    return torch.where(first < chance, kind + FIRST_INCIDENT, 0)
