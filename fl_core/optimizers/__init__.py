"""Optimisers, one file each, found by name: ``build(params, config) -> torch.optim.Optimizer``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fl_core.contracts.errors import unknown_name
from fl_core.contracts.sections import OptimizerConfig

if TYPE_CHECKING:
    import torch


def known_optimizers() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def check_name(config: OptimizerConfig) -> None:
    """Raises InputError with the list of the known ones; for those who only pass the configuration on to clients."""
    if config.name not in known_optimizers():
        raise unknown_name("optimizer.name", config.name, known_optimizers())


def build_optimizer(params: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """By ``config.name``. Raises InputError with the list of the known ones."""
    check_name(config)
    module = importlib.import_module(f"{__name__}.{config.name}")
    built: torch.optim.Optimizer = module.build(params, config)
    return built
