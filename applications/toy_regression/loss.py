"""Squared error as (numerator, denominator): sums over examples, so that any split of a batch adds up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_core.learning import seeding


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs, targets: (N,). Returns (sum of squared errors, N)."""
    error = outputs - targets.to(outputs.dtype)
    return (error * error).sum(), error.new_tensor(float(len(error)))


def sample(outputs: Tensor, keys: npt.NDArray[np.uint64], config: Any) -> Tensor:
    """(N,) targets drawn from N(outputs, 1/2), whose negative log-likelihood the squared error is (Box-Muller)."""
    first, second = seeding.uniform(keys, 0), seeding.uniform(keys, 1)
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
    return outputs + torch.from_numpy(normal * 0.5**0.5).to(outputs)
