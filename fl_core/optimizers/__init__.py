"""Optimisers, one file each, found by name: ``build(model, config, group) -> torch.optim.Optimizer``.

An optimiser gets the whole module, because curvature belongs to layers; most need its trainable parameters only. ``group``
is the process group over which the gradients are already summed: an optimiser may spread its work over it, and must do
the same on every rank. Without one it works alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fl_core.contracts.errors import ConfigError, unknown_name
from fl_core.contracts.sections import OptimizerConfig

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


def known_optimizers() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def check_name(config: OptimizerConfig) -> None:
    """Raises InputError with the list of the known ones; for those who only pass the configuration on to clients."""
    if config.name not in known_optimizers():
        raise unknown_name("optimizer.name", config.name, known_optimizers())


def check_local(config: OptimizerConfig) -> None:
    """Of the local updates of a federation. Raises InputError for an unknown name, ConfigError for what only pretraining does."""
    check_name(config)
    if config.name == "kfac" and config.fisher == "sampled":
        raise ConfigError(
            "optimizer.fisher = 'sampled': local updates draw no targets, only pretraining does",
            remedy="set optimizer.fisher=empirical",
        )


def build_optimizer(
    model: torch.nn.Module | Iterable[torch.nn.Parameter],
    config: OptimizerConfig,
    group: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """By ``config.name``, for a module's trainable parameters, or for bare parameters (no layers: K-FAC is SGD there).

    Raises InputError with the list of the known ones.
    """
    import torch

    check_name(config)
    module = model if isinstance(model, torch.nn.Module) else torch.nn.ParameterList(model)
    built: torch.optim.Optimizer = importlib.import_module(f"{__name__}.{config.name}").build(module, config, group)
    return built


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
