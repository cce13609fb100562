"""Learning rates as functions of the global step."""

from __future__ import annotations

import math

from fl_core.contracts.sections import PretrainConfig


def learning_rate(config: PretrainConfig, base: float, step: int, total: int) -> float:
    """Linear warm-up, then constant, cosine (Loshchilov & Hutter 2017) or polynomial decay. ``step`` counts from 0.

    ``base`` is the rate at ``pretrain.lr_batch_size`` where that is given, and scaled to the batch first.
    """
    peak = base * batch_scale(config)
    warmup = warmup_steps(config, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "polynomial":
        return peak * math.pow(1 - progress, config.power)
    return peak


def warmup_steps(config: PretrainConfig, total: int) -> int:
    """``pretrain.warmup_fraction`` of all steps; with little data ``pretrain.warmup_steps``, or half of all where that is less."""
    return max(int(config.warmup_fraction * total), min(config.warmup_steps, total // 2))


def batch_scale(config: PretrainConfig) -> float:
    """Linear in the batch for SGD (Goyal et al. 2017), its square root for adaptive methods (Malladi et al. 2022)."""
    if not config.lr_batch_size:
        return 1.0
    ratio = config.batch_size / config.lr_batch_size
    return ratio if config.lr_scaling == "linear" else math.sqrt(ratio)
