"""AdamW (Loshchilov & Hutter, ICLR 2019); torch's, one fused pass over the parameters."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import trainable
from fl_core.optimizers._eager import eager


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    built: torch.optim.Optimizer = eager(torch.optim.AdamW)(
        trainable(model), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    return built
