"""Measuring the ways of doing local updates: each trains the same few clients, is held to the sequential one, and is timed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fl_clients.training.client import Learner
from fl_core.algorithms.base import Algorithm, ClientUpdate, MeanAggregator
from fl_core.contracts.config import to_table
from fl_core.flower.messages import Request
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import get_arrays
from simulations.engine.names import FUSED, SEQUENTIAL
from simulations.engine.paths import Path, Results, Task
from simulations.engine.paths.sequential import BLOCK, SequentialPath
from simulations.engine.population import Population

log = logging.getLogger(__name__)
BUDGET_SECONDS = (
    1.5  # of CPU for all candidates together, whatever else the machine does: the first round must not wait long
)
BUDGET_SHARE = 1 / 3  # of the predicted time of the run, where that is less
CLIENT_SECONDS = 0.1  # of one client's sequential update: of longer ones only so many steps are measured
# Of a client's change, in float32: ties may fall differently, and adaptive optimisers magnify rounding where gradients are
# near zero; clients that a model mixes up differ by about 1. The exact comparison, in float64, is the tests'.
DEVIATION = 0.15

Build = Callable[[str, int, Learner], Path]


@dataclass(frozen=True)
class Pace:
    """Of the sequential way: seconds of CPU for a step, steps of a usual client."""

    step_s: float
    steps: int

    @property
    def client_s(self) -> float:
        return self.step_s * self.steps

    @property
    def measured_steps(self) -> int:
        """Of each client, so that measuring is not long where clients are."""
        return min(self.steps, max(2, int(CLIENT_SECONDS / max(self.step_s, 1e-9))))


def sequential_pace(learner: Learner, population: Population, size: int, seed: int) -> Pace | None:
    """From two steps of one client, after one that initialises; None where no client has examples."""
    torch.set_num_threads(1)
    settings, learner = learner.config.algorithm, stateless(learner)
    steps = max(1, math.ceil(size / settings.batch_size) * settings.local_epochs)
    tasks = sample(learner, population, 1, seed)
    if not tasks:
        return None
    oracle, request = SequentialPath(learner), first_request(learner, seed)
    list(oracle.train(tasks, replace(request, max_steps=1)))
    start = time.process_time()
    list(oracle.train(tasks, replace(request, max_steps=2)))
    return Pace((time.process_time() - start) / min(2, steps), steps)


def first_request(learner: Learner, seed: int) -> Request:
    return Request(
        application=learner.application.name,
        config=to_table(learner.config),
        round=1,
        num_rounds=1,
        seed=seed,
        arrays=get_arrays(learner.model),
    )


def measured(
    learner: Learner,
    population: Population,
    candidates: list[tuple[str, int]],
    seed: int,
    build: Build,
    pace: Pace,
    run_seconds: float,
) -> dict[tuple[str, int], float]:
    """Clients a second of the sequential way and of each candidate; one whose results deviate is left out, with a warning.

    run_seconds: predicted of the run, done sequentially by all cores.
    """
    torch.set_num_threads(1)
    learner = stateless(learner)
    tasks = sample(learner, population, max(k for _, k in candidates), seed)
    request = replace(first_request(learner, seed), max_steps=pace.measured_steps)
    share = pace.measured_steps / pace.steps  # of a client's update
    budget = min(BUDGET_SECONDS, BUDGET_SHARE * run_seconds)
    few = tasks[: min(3, len(tasks))]
    oracle = SequentialPath(learner)
    start = time.process_time()
    expected = list(oracle.train(few, request))
    rates = {(SEQUENTIAL, BLOCK): share * len(few) / (time.process_time() - start)}
    began = time.process_time()
    for name, block in candidates:
        if block > len(tasks) or time.process_time() - began > budget:
            continue
        rate = candidate_rate(build(name, block, learner), block, tasks, request, few, expected)
        if rate:
            rates[name, block] = share * rate
    return rates


def label(name: str, block: int) -> str:
    return f"{name}:{block}" if name not in (FUSED, SEQUENTIAL) else name


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
    path: Path,
    block: int,
    tasks: list[Task],
    request: Request,
    few: list[Task],
    expected: list[Results],
) -> float:
    """Clients a second of full stacks; 0 where the path fails or its results are not those of the sequential one."""
    name = path.name
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
