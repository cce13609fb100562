"""Which way of doing local updates is taken: measured once for a model, its data, its training and this machine.

Every candidate trains the same few clients, is held to the sequential local update on them, and is timed. The result
is kept in a file of the user's cache folder, so that the next run starts at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path as File
from typing import Any

import numpy as np
import torch

from fl_clients.training.client import Learner
from fl_core.algorithms.base import Algorithm, ClientUpdate, MeanAggregator
from fl_core.contracts.config import to_table
from fl_core.flower.messages import Request
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import get_arrays
from fl_core.runtime.machine import cpu_name
from fl_core.storage import atomic
from simulations.engine import native
from simulations.engine.cache import cache_folder
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
from simulations.engine.paths import Path, Results, Task
from simulations.engine.paths.functional import FunctionalPath
from simulations.engine.paths.sequential import BLOCK, SequentialPath
from simulations.engine.paths.stacked import StackedPath
from simulations.engine.population import Population
from simulations.engine.processes import usable_cores
from simulations.engine.program.compiler import UnsupportedModel

log = logging.getLogger(__name__)
VERSION = 3  # of the paths: measurements of other ones are not taken over
STACKS = (8, 32, 128)
LITTLE = 20_000  # examples: below that the sequential way is done before the others are measured
BUDGET_SECONDS = (
    1.5  # of CPU for all candidates together, whatever else the machine does: the first round must not wait long
)
LEAVES_PER_CORE = 4  # a stack is never so large that a round leaves cores without work
STACK_BYTES = 256 << 20  # of parameters of all clients of a stack
# Of a client's change, in float32: ties may fall differently, and adaptive optimisers magnify rounding where gradients are
# near zero; clients that a model mixes up differ by about 1. The exact comparison, in float64, is the tests'.
DEVIATION = 0.15


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
    if rounds * work_of_a_round(learner, population) < LITTLE:
        return Chosen(SEQUENTIAL, BLOCK, "too little to do to measure first")
    reason = reason_against(FUSED, 1, learner)
    candidates = [(STACKED, k) for k in stacks(most)] if not reason else [(FUNCTIONAL, k) for k in stacks(most)]
    if not reason:
        candidates.insert(0, (FUSED, 1))
    elif why := reason_against(FUNCTIONAL, 2, learner):
        return Chosen(SEQUENTIAL, BLOCK, f"{reason}; {why}" if why != reason else reason)
    return remembered(learner, population, candidates, seed, cache or cache_file())


def work_of_a_round(learner: Learner, population: Population) -> float:
    """Examples that a round trains on, about."""
    algorithm = learner.config.algorithm
    return float((algorithm.clients_per_round or len(population)) * algorithm.local_epochs * usual_size(population))


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
    learner: Learner, population: Population, candidates: list[tuple[str, int]], seed: int, cache: File
) -> Chosen:
    key = signature(learner, population, candidates)
    known = read_cache(cache)
    found = known.get(key)
    if isinstance(found, dict) and (found.get("name"), found.get("block")) in [*candidates, (SEQUENTIAL, BLOCK)]:
        return Chosen(found["name"], found["block"], "measured before", dict(found.get("rates", {})))
    chosen = measured(learner, population, candidates, seed)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        entry = {k: v for k, v in asdict(chosen).items() if k != "why"}
        atomic.write_bytes(cache, json.dumps({**known, key: entry}, indent=1).encode())
    except OSError as error:
        log.info("measurement not kept: %s", error)
    return chosen


def measured(learner: Learner, population: Population, candidates: list[tuple[str, int]], seed: int) -> Chosen:
    """Clients a second of each candidate; one whose results deviate is left out, with a warning."""
    torch.set_num_threads(1)
    learner = stateless(learner)
    tasks = sample(learner, population, max(k for _, k in candidates), seed)
    request = Request(
        application=learner.application.name,
        config=to_table(learner.config),
        round=1,
        num_rounds=1,
        seed=seed,
        arrays=get_arrays(learner.model),
    )
    if not tasks:
        return Chosen(SEQUENTIAL, BLOCK, "no client with examples to measure with")
    few = tasks[: min(3, len(tasks))]
    oracle = SequentialPath(learner)
    list(oracle.train(few[:1], request))  # first calls initialise kernels
    start = time.process_time()
    expected = list(oracle.train(few, request))
    rates = {SEQUENTIAL: len(few) / (time.process_time() - start)}
    sizes, began = {SEQUENTIAL: BLOCK}, time.process_time()
    for name, block in candidates:
        label = f"{name}:{block}" if name != FUSED else name
        if block > len(tasks) or time.process_time() - began > BUDGET_SECONDS:
            continue
        rate = candidate_rate(name, block, learner, tasks, request, few, expected)
        if rate:
            rates[label], sizes[label] = rate, block
    best = max(rates, key=lambda label: rates[label])
    shown = ", ".join(f"{label} {rate:,.1f}" for label, rate in sorted(rates.items(), key=lambda p: -p[1]))
    return Chosen(best.partition(":")[0], sizes[best], f"measured, clients a second in one process: {shown}", rates)


def stateless(learner: Learner) -> Learner:
    """The same work by an algorithm that keeps nothing on clients: measuring must leave no trace."""
    algorithm = replace(learner.config.algorithm, name="fedavg", personal=())
    return replace(
        learner,
        config=replace(learner.config, algorithm=algorithm),
        algorithm=Algorithm(MeanAggregator(), ClientUpdate()),
        states=None,
    )


def candidate_rate(
    name: str,
    block: int,
    learner: Learner,
    tasks: list[Task],
    request: Request,
    few: list[Task],
    expected: list[Results],
) -> float:
    """Clients a second of full stacks; 0 where the path fails or its results are not those of the sequential one."""
    path = build_path(name, block, learner)
    try:
        with torch.no_grad():
            found = [copied(one) for one in path.train(few, request)]
            if why := deviation(found, expected, request):
                log.warning("the %s engine is not used: %s", name, why)
                return 0.0
            whole = tasks[: max(block, min(3, len(tasks)))]
            list(path.train(whole, request))
            start = time.process_time()
            list(path.train(whole, request))
            return len(whole) / (time.process_time() - start)
    except Exception as error:  # the application's own code under transformations that it does not know
        log.info("the %s engine does not run: %s", name, error)
        return 0.0


def copied(one: Results) -> Results:
    """A path's results lie in its buffers until the next ones."""
    return Results(one.positions, {k: np.array(v) for k, v in one.arrays.items()}, one.num_examples, one.metrics)


def deviation(found: list[Results], expected: list[Results], request: Request) -> str:
    """How the results differ, against each client's own change; "" when they do not."""
    ours = {p: (one, i) for one in found for i, p in enumerate(one.positions)}
    for one in expected:
        for i, position in enumerate(one.positions):
            if position not in ours:
                return "a client has no result"
            other, j = ours[position]
            difference = change = 0.0
            for name, start in request.arrays.items():
                a = np.asarray(one.arrays[name][i], np.float64)
                difference += float(np.sum((np.asarray(other.arrays[name][j], np.float64) - a) ** 2))
                change += float(np.sum((a - np.asarray(start, np.float64)) ** 2))
            if not difference**0.5 <= DEVIATION * change**0.5 + 1e-6:
                return f"its result differs by {difference**0.5 / (change**0.5 or 1):.1%} of a client's change"
    return ""


def sample(learner: Learner, population: Population, count: int, seed: int) -> list[Task]:
    """Up to ``count`` clients with examples, from the first ones."""
    found: list[Task] = []
    for index in range(min(len(population), 2 * count)):
        if len(found) == count:
            break
        name = population.name(index)
        try:
            data = client_data(population.examples(index), name, learner.config.data.validation_fraction, seed)
        except Exception as error:  # the application's own code: the round will refuse this client with its reason
            log.info("client %s is not measured with: %s", name, error)
            continue
        if len(data.train):
            found.append(Task(name, partial(_same, data)))
    return found


def _same(data: Any) -> Any:
    return data


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
    shapes = {k: [list(v.shape[1:]), str(v.dtype)] for k, v in population.examples(0).inputs.items()}
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
        [torch.__version__, cpu_name(), usable_cores(), native.kernels() is not None],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
