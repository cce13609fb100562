"""Learning rates as functions of the global step."""

from __future__ import annotations

import math

from fl_core.contracts.sections import PretrainConfig


def learning_rate(config: PretrainConfig, base: float, step: int, total: int) -> float:
    """Linear warm-up (Goyal et al. 2017), then constant or cosine (Loshchilov & Hutter 2017). ``step`` counts from 0."""
    warmup = int(config.warmup_fraction * total)
    if step < warmup:
        return base * (step + 1) / warmup
    if config.schedule == "constant":
        return base
    progress = (step - warmup) / max(1, total - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * progress))
