"""LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888): SGD whose step in each layer is scaled by the norm of its weights.

pytorch-optimizer's. Vectors and scalars (biases, norms) take plain SGD steps without weight decay."""

from __future__ import annotations

import torch
import torch.distributed as dist
from pytorch_optimizer import LARS

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import trainable


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    return LARS(
        trainable(model),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust_coefficient=config.trust,
    )
