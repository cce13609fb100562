"""AdamW (Loshchilov & Hutter, ICLR 2019); torch's, one fused pass over the parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fl_core.contracts.sections import OptimizerConfig


def build(params: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, fused=True)
