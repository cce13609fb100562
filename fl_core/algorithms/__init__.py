"""Federated algorithms, one file each, found by name: ``build(config) -> Algorithm``."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fl_core.algorithms.base import Algorithm
from fl_core.contracts.errors import InputError, unknown_name
from fl_core.contracts.sections import AlgorithmConfig

ENTRY_POINT_GROUP = "fieldfleet.algorithms"
Build = Callable[[AlgorithmConfig], Algorithm]
_registered: dict[str, Build] = {}


def register_algorithm(name: str, build: Build) -> None:
    """For this process and the workers it starts: ``algorithm.name = name`` then means build(config).

    Packages use the entry point ``fieldfleet.algorithms`` instead. Raises InputError when the name is taken.
    """
    if name in known_algorithms():
        raise InputError(f"algorithm {name!r} exists already", remedy="register another name")
    _registered[name] = build


@contextmanager
def registered(name: str, build: Build) -> Iterator[None]:
    """The same, for as long as the context lasts."""
    register_algorithm(name, build)
    try:
        yield
    finally:
        del _registered[name]


def known_algorithms() -> list[str]:
    own = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    return sorted({*own, *_registered, *(e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))})


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """By ``config.name``. Raises InputError with the list of the known ones."""
    if config.name not in known_algorithms():
        raise unknown_name("algorithm.name", config.name, known_algorithms())
    if config.name in _registered:
        return _registered[config.name](config)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == config.name:
            built: Algorithm = entry.load()(config)
            return built
    made: Algorithm = importlib.import_module(f"{__name__}.{config.name}").build(config)
    return made
