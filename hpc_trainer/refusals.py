"""Combinations under which the loss would depend on the number of processes or micro-batches: refused, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fl_core.contracts.errors import ConfigError
from fl_core.learning.application import Application
from fl_core.learning.normalization import GHOST_BATCH
from hpc_trainer.batch_norm import normalises_by_batch
from hpc_trainer.coarse import levels
from hpc_trainer.dropout import KINDS as DROPOUTS
from hpc_trainer.layout import PARTS, Layout

ELEMENTWISE = ("sgd", "adamw")  # optimisers that treat each element alone, and so may hold any part of a parameter
OTHER_NORM = "set model.norm=ghost or model.norm=group"


def refuse_arrangement(config: Any, sizes: Mapping[str, int]) -> None:
    """What the launching process can refuse already."""
    name, pretrain = config.optimizer.name, config.pretrain
    levels(pretrain.coarse)
    used, whole = [d for d in PARTS if sizes[d] > 1], pretrain.parallel == "ddp"
    cut = sizes["shard"] > 1 or (used and used != ["spatial"]) or (used and not whole)
    if cut and name not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer.name = {name!r} needs whole parameters of the whole model, which this arrangement cuts",
            remedy=f"set pretrain.parallel=ddp and pretrain.mesh='', or one of {', '.join(ELEMENTWISE)}",
        )
    if used and name == "kfac":
        raise ConfigError(
            "optimizer.name = 'kfac' measures whole activations, which spatial parallelism cuts",
            remedy="choose another optimiser, or no spatial dimension in pretrain.mesh",
        )
    if len(used) > 1:
        raise ConfigError(
            f"pretrain.mesh: {' and '.join(used)} exclude each other",
            remedy="each goes with data parallelism; spatial with pretrain.parallel=fsdp too, which cuts parameters",
        )
    if used and used != ["spatial"] and not whole:
        raise ConfigError(
            f"pretrain.parallel = {pretrain.parallel!r} and a {used[0]} dimension in pretrain.mesh exclude each other",
            remedy=f"set pretrain.parallel=ddp, or leave {used[0]} out",
        )
    if used and pretrain.compile:
        raise ConfigError(f"pretrain.compile and a {used[0]} dimension in pretrain.mesh exclude each other")
    if sizes["pipeline"] > 1:
        refuse_in_stages(config)


def refuse_in_stages(config: Any) -> None:
    """Stages are traced: what acts from outside of the graph cannot be in them."""
    pretrain = config.pretrain
    if config.model.norm in ("batch", "ghost"):
        raise ConfigError(
            f"model.norm = {config.model.norm!r}: pipeline stages see one micro-batch at a time",
            remedy="set model.norm=group, or leave pipeline out of pretrain.mesh",
        )
    for key, off in (("activation_checkpointing", False), ("precision", "full"), ("coarse", "")):
        if getattr(pretrain, key) != off:
            raise ConfigError(
                f"pretrain.{key} = {getattr(pretrain, key)!r} and a pipeline dimension in pretrain.mesh exclude each other"
            )


def refuse_what_breaks_integrity(
    model: nn.Module, config: Any, layout: Layout, micro_batches: int, dtype: torch.dtype
) -> None:
    """Raises ConfigError before any work starts."""
    refuse_arrangement(config, layout.sizes)
    if layout.sizes["pipeline"] > 1 and any(type(m) in DROPOUTS and m.p > 0 for m in model.modules()):  # type: ignore[operator]
        raise ConfigError(
            "dropout and a pipeline dimension in pretrain.mesh exclude each other", remedy="set dropout to 0"
        )
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


def refuse_what_draws_no_targets(application: Application, config: Any) -> None:
    if config.optimizer.name == "kfac" and config.optimizer.fisher == "sampled" and not application.sample:
        raise ConfigError(
            f"optimizer.fisher = 'sampled': {application.name} does not say how its model draws targets",
            remedy="set optimizer.fisher=empirical, or give the application a sample function",
        )
    if config.optimizer.name == "kfac" and config.optimizer.fisher == "sampled" and config.pretrain.compile:
        raise ConfigError(  # a compiled graph is passed through backwards once
            "optimizer.fisher = 'sampled' and pretrain.compile exclude each other",
            remedy="set optimizer.fisher=empirical, or pretrain.compile=false",
        )
