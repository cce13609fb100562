"""LAMB (You et al., ICLR 2020, arXiv:1904.00962): Adam whose step in each layer is scaled by the norm of its weights.

pytorch-optimizer's, with Adam's correction of bias: without it the first steps are ten times too small."""

from __future__ import annotations

import torch
import torch.distributed as dist
from pytorch_optimizer import Lamb

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import trainable


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    return Lamb(trainable(model), lr=config.lr, weight_decay=config.weight_decay, adam_debias=True)
