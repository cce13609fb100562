"""Stochastic gradient descent with momentum (Polyak 1964) and L2 weight decay; torch's."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fl_core.contracts.sections import OptimizerConfig


def build(params: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
