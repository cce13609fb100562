"""Federated algorithms, one file each, found by name: ``build(config) -> Algorithm``."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

from fl_core.algorithms.base import Algorithm
from fl_core.contracts.errors import unknown_name
from fl_core.contracts.sections import AlgorithmConfig

ENTRY_POINT_GROUP = "fieldfleet.algorithms"


def known_algorithms() -> list[str]:
    own = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    return sorted({*own, *(e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))})


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """By ``config.name``. Raises InputError with the list of the known ones."""
    if config.name not in known_algorithms():
        raise unknown_name("algorithm.name", config.name, known_algorithms())
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == config.name:
            built: Algorithm = entry.load()(config)
            return built
    made: Algorithm = importlib.import_module(f"{__name__}.{config.name}").build(config)
    return made
