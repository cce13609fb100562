"""Which way of doing local updates is taken: measured once for a model, its data, its training and this machine.

Two steps of one client say how long the run would take sequentially. Where that is long enough, every candidate is measured (by
``measure``), and the result kept in a file of the user's cache folder, so that the next run starts at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path as File
from typing import Any

import numpy as np
import torch

from fl_clients.training.client import Learner
from fl_core.runtime.machine import cpu_name
from fl_core.storage import atomic
from simulations.engine import native
from simulations.engine.cache import cache_folder
from simulations.engine.measure import label, measured, sample, sequential_pace
from simulations.engine.names import (
    AUTO,
    DEFAULT_STACK,
    ENGINES,
    FUNCTIONAL,
    FUSED,
    MAX_STACK,
    SEQUENTIAL,
    STACKED,
    parsed,
)
from simulations.engine.paths import Path
from simulations.engine.paths.functional import FunctionalPath
from simulations.engine.paths.sequential import BLOCK, SequentialPath
from simulations.engine.paths.stacked import StackedPath
from simulations.engine.population import Population
from simulations.engine.processes import usable_cores
from simulations.engine.program.compiler import UnsupportedModel

log = logging.getLogger(__name__)
VERSION = 3  # of the paths: measurements of other ones are not taken over
STACKS = (8, 32, 128)
WORTH_SECONDS = 1.0  # that the run would take sequentially: below, it is done before the others are measured
LEAVES_PER_CORE = 4  # a stack is never so large that a round leaves cores without work
STACK_BYTES = 256 << 20  # of parameters of all clients of a stack


@dataclass(frozen=True)
class Chosen:
    """block: clients at once; why: in words; rates: candidate -> clients a second in one process, where measured."""

    name: str
    block: int
    why: str
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def build(self) -> Callable[[Learner], Path]:
        return partial(build_path, self.name, self.block)

    def shown(self) -> str:
        stack = f":{self.block}" if self.name in (STACKED, FUNCTIONAL) else ""
        return f"{self.name}{stack} ({self.why})"


def build_path(name: str, block: int, learner: Learner) -> Path:
    """Raises UnsupportedModel."""
    if name == SEQUENTIAL:
        return SequentialPath(learner)
    if name == FUNCTIONAL:
        return FunctionalPath(learner, block)
    return StackedPath(learner, 1 if name == FUSED else block)


def choose(
    engine: str,
    learner: Learner,
    population: Population,
    *,
    rounds: int,
    seed: int,
    kept: File | None = None,
    cache: File | None = None,
) -> Chosen:
    """engine: "auto", a name, or "NAME:K". What cannot be done falls back to sequential and says why.

    kept: where the choice of this run is noted, so that it goes on with the same one. cache: the file of measurements
    (default: in the user's cache folder). Raises InputError for an unknown name.
    """
    if engine == AUTO and kept is not None and (found := read_cache(kept)):
        name, block = found.get("name"), found.get("block")
        if name in ENGINES and name != AUTO and isinstance(block, int) and 1 <= block <= MAX_STACK:
            return Chosen(name, block, "as this run began")
        log.warning("%s does not say how this run began: the engine is chosen again", kept)
    chosen = _choose(engine, learner, population, rounds, seed, cache)
    if chosen.name in (FUSED, STACKED):
        native.kernels()  # loaded, or built, before workers are forked
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(kept, {"name": chosen.name, "block": chosen.block})
    return chosen


def _choose(
    engine: str, learner: Learner, population: Population, rounds: int, seed: int, cache: File | None
) -> Chosen:
    name, block = parsed(engine)
    if name == SEQUENTIAL:
        return Chosen(SEQUENTIAL, BLOCK, "as asked")
    most = largest_stack(learner, population)
    if name != AUTO:
        wanted = block or min(most, DEFAULT_STACK)
        reason = reason_against(name, wanted, learner)
        if not reason:
            return Chosen(name, 1 if name == FUSED else wanted, "as asked")
        log.warning("the %s engine does not take this model, the sequential one does: %s", name, reason)
        return Chosen(SEQUENTIAL, BLOCK, f"{name}: {reason}")
    reason = reason_against(FUSED, 1, learner)
    candidates = [(STACKED, k) for k in stacks(most)] if not reason else [(FUNCTIONAL, k) for k in stacks(most)]
    if not reason:
        candidates.insert(0, (FUSED, 1))
    elif why := reason_against(FUNCTIONAL, 2, learner):
        return Chosen(SEQUENTIAL, BLOCK, f"{reason}; {why}" if why != reason else reason)
    if not candidates:
        return Chosen(SEQUENTIAL, BLOCK, f"{reason}; too few clients a round to stack any")
    updates = rounds * (learner.config.algorithm.clients_per_round or len(population))
    return remembered(learner, population, candidates, updates, seed, cache or cache_file())


def usual_size(population: Population) -> int:
    """The median of some clients' numbers of examples."""
    return int(np.median([population.size(i) for i in range(0, len(population), max(1, len(population) // 50))]))


def stacks(most: int) -> list[int]:
    """The stacks to measure; the largest possible one too where it is well above the last: small models gain up to there."""
    found = [k for k in STACKS if k <= most]
    return [*found, most] if most >= 2 and most < STACKS[-1] and most >= 1.5 * (found[-1] if found else 0) else found


def largest_stack(learner: Learner, population: Population) -> int:
    """So that a round keeps every core of this machine busy; independent of the number of workers, as the bits are."""
    asked = learner.config.algorithm.clients_per_round or len(population)
    size = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    return max(
        1, min(min(asked, len(population)) // (LEAVES_PER_CORE * usable_cores()), STACK_BYTES // max(1, 3 * size))
    )


def reason_against(name: str, block: int, learner: Learner) -> str:
    """Why this path does not take the learner; "" when it does."""
    try:
        build_path(name, block, learner)
    except UnsupportedModel as error:
        return str(error)
    return ""


# measuring


def remembered(
    learner: Learner, population: Population, candidates: list[tuple[str, int]], updates: int, seed: int, cache: File
) -> Chosen:
    """What was measured before; else measured now, where ``updates`` of clients are enough work to win that time back."""
    key = signature(learner, population, candidates)
    known = read_cache(cache)
    found = known.get(key)
    if isinstance(found, dict) and (found.get("name"), found.get("block")) in [*candidates, (SEQUENTIAL, BLOCK)]:
        return Chosen(found["name"], found["block"], "measured before", dict(found.get("rates", {})))
    size = usual_size(population)
    pace = sequential_pace(learner, population, size, seed)
    if pace is None:
        return Chosen(SEQUENTIAL, BLOCK, "no client with examples to measure with")
    seconds = pace.client_s * updates / usable_cores()
    if seconds < WORTH_SECONDS:
        return Chosen(SEQUENTIAL, BLOCK, f"too little to do to measure first: about {seconds:.1f} s")
    rates = measured(learner, population, candidates, seed, build_path, pace, seconds)
    name, block = max(rates, key=lambda one: rates[one])
    named = {label(*one): rate for one, rate in sorted(rates.items(), key=lambda pair: -pair[1])}
    shown = ", ".join(f"{one} {rate:,.1f}" for one, rate in named.items())
    chosen = Chosen(name, block, f"measured, clients a second in one process: {shown}", named)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        entry = {k: v for k, v in asdict(chosen).items() if k != "why"}
        atomic.write_bytes(cache, json.dumps({**known, key: entry}, indent=1).encode())
    except OSError as error:
        log.info("measurement not kept: %s", error)
    return chosen


# the cache


def cache_file() -> File:
    return cache_folder() / "engines.json"


def read_cache(file: File) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def signature(learner: Learner, population: Population, candidates: list[tuple[str, int]]) -> str:
    """Of all that the speed depends on."""
    config = learner.config
    inputs = [task.data().train.inputs for task in sample(learner, population, 1, 0)]  # none: every client there fails
    shapes = [{k: [list(v.shape[1:]), str(v.dtype)] for k, v in one.items()} for one in inputs]
    facts = [
        VERSION,
        learner.application.name,
        repr(learner.model),
        [[n, list(p.shape), str(p.dtype), str(p.device)] for n, p in learner.model.named_parameters()],
        shapes,
        usual_size(population),
        [config.algorithm.batch_size, config.algorithm.name, config.algorithm.local_epochs],
        asdict(config.optimizer),
        candidates,
        [torch.__version__, cpu_name(), usable_cores(), native.version()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
