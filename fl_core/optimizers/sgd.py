"""Stochastic gradient descent with momentum (Polyak 1964) and L2 weight decay; torch's."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import trainable
from fl_core.optimizers._eager import eager


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    built: torch.optim.Optimizer = eager(torch.optim.SGD)(
        trainable(model), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    return built
