"""Combinations under which the loss would depend on the number of processes or micro-batches: refused, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fl_core.contracts.errors import ConfigError
from fl_core.learning.normalization import GHOST_BATCH
from hpc_trainer.batch_norm import normalises_by_batch
from hpc_trainer.layout import Layout

ELEMENTWISE = ("sgd", "adamw")  # optimisers that treat each element alone, and so may hold any part of a parameter
OTHER_NORM = "set model.norm=ghost or model.norm=group"


def refuse_arrangement(config: Any, sizes: Mapping[str, int]) -> None:
    """What the launching process can refuse already."""
    name, pretrain = config.optimizer.name, config.pretrain
    spatial, tensor, whole = sizes["spatial"] > 1, sizes["tensor"] > 1, pretrain.parallel == "ddp"
    cut = sizes["shard"] > 1 or tensor or (spatial and not whole)
    if cut and name not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer.name = {name!r} needs whole parameters, which {'tensor parallelism' if tensor else 'sharding'} cuts",
            remedy=f"set pretrain.parallel=ddp without a tensor dimension, or one of {', '.join(ELEMENTWISE)}",
        )
    if spatial and name == "kfac":
        raise ConfigError(
            "optimizer.name = 'kfac' measures whole activations, which spatial parallelism cuts",
            remedy="choose another optimiser, or no spatial dimension in pretrain.mesh",
        )
    for dimension in ("spatial", "tensor"):
        if sizes[dimension] > 1 and pretrain.compile:
            raise ConfigError(f"pretrain.compile and a {dimension} dimension in pretrain.mesh exclude each other")
    if tensor and spatial:
        raise ConfigError(
            "pretrain.mesh: tensor and spatial exclude each other",
            remedy="cut volumes (spatial) where activations are too large, and shard parameters with pretrain.parallel=fsdp",
        )
    if tensor and not whole:
        raise ConfigError(
            f"pretrain.parallel = {pretrain.parallel!r} and a tensor dimension in pretrain.mesh exclude each other",
            remedy="set pretrain.parallel=ddp, or leave tensor out: fsdp cuts parameters too",
        )


def refuse_what_breaks_integrity(
    model: nn.Module, config: Any, layout: Layout, micro_batches: int, dtype: torch.dtype
) -> None:
    """Raises ConfigError before any work starts."""
    refuse_arrangement(config, layout.sizes)
    batch_norm = any(normalises_by_batch(m) for m in model.modules())
    pretrain = config.pretrain
    if batch_norm and micro_batches > 1:
        raise ConfigError(
            f"batch normalisation over {micro_batches} micro-batches would normalise each on its own",
            remedy=f"{OTHER_NORM}, or set pretrain.micro_batch=0",
        )
    if config.model.norm == "ghost" and pretrain.micro_batch % GHOST_BATCH:
        raise ConfigError(
            f"pretrain.micro_batch = {pretrain.micro_batch} would cut ghost batches of {GHOST_BATCH}",
            remedy=f"choose a multiple of {GHOST_BATCH}",
        )
    if pretrain.precision == "bf16" and dtype == torch.float64:
        raise ConfigError("pretrain.precision = 'bf16' and float64 exclude each other")
