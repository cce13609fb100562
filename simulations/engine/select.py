"""Which way of doing local updates is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fl_clients.training.client import Learner
from fl_core.contracts.errors import unknown_name
from simulations.engine.names import ENGINES, SEQUENTIAL
from simulations.engine.paths import Path
from simulations.engine.paths.sequential import BLOCK, SequentialPath
from simulations.engine.population import Population


@dataclass(frozen=True)
class Chosen:
    """build(learner) -> Path; block: its clients at once; why: in words."""

    name: str
    block: int
    build: Callable[[Learner], Path]
    why: str


def choose(engine: str, learner: Learner, population: Population, *, seed: int) -> Chosen:
    """Raises InputError for an unknown name."""
    if engine not in ENGINES:
        raise unknown_name("engine", engine, list(ENGINES))
    return Chosen(SEQUENTIAL, BLOCK, SequentialPath, "the only one")
