"""What a worker does: it holds one model, keeps its clients' data, and turns units of clients into partial states."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fl_clients.training.client import Learner, evaluate_client, failure, train_client
from fl_core.algorithms.base import State
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import IntegrityError
from fl_core.flower.messages import Reply, Request
from fl_core.learning.examples import ClientData
from fl_core.learning.partition import client_data
from fl_core.learning.personal import personal_names
from fl_server.screening import screen_update
from simulations.engine.paths import Path, Results, Task
from simulations.engine.placement import Unit
from simulations.engine.population import Population
from simulations.engine.summation import SumTree, in_place

CACHE_BYTES = 128 << 20  # of clients' examples that a worker keeps from round to round
SUMS, REPLIES, EVALUATION = "sums", "replies", "evaluation"


@dataclass(frozen=True)
class Job:
    """What all units of one exchange have in common. kind: SUMS, REPLIES (whole updates) or EVALUATION."""

    number: int
    kind: str
    request: Request


@dataclass
class Facts:
    """Of some clients: numbers of examples and metrics of each, side by side; and why the others do not count."""

    clients: list[int] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)
    metrics: list[Mapping[str, float]] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    def add(self, client: int, num_examples: int, metrics: Mapping[str, float]) -> None:
        self.clients.append(client)
        self.num_examples.append(num_examples)
        self.metrics.append(metrics)

    def extend(self, other: Facts) -> None:
        self.clients += other.clients
        self.num_examples += other.num_examples
        self.metrics += other.metrics
        self.refused |= other.refused


@dataclass
class UnitResult:
    """state: with SUMS, itself or what stands for it where it stays on the worker's node; replies: client -> whole reply, with REPLIES; timings: (clients, examples, seconds) of each leaf."""

    job: int
    unit: Unit
    facts: Facts = field(default_factory=Facts)
    state: Any = None
    replies: dict[int, Reply] = field(default_factory=dict)
    timings: list[tuple[int, int, float]] = field(default_factory=list)


class ClientWorker:
    """Runs in a process of its own, on a node of a cluster, or right here; one unit at a time.

    train: builds the way of doing local updates; None = sequentially.
    """

    def __init__(self, learner: Learner, population: Population, path: Callable[[Learner], Path], *, seed: int) -> None:
        self.learner, self.population, self.seed = learner, population, seed
        self.path = path(learner)
        self._cache = Cache(CACHE_BYTES)
        self._job: Job | None = None

    def begin(self, job: Job) -> None:
        self._job = job

    def run(self, unit: Unit) -> UnitResult:
        """Never raises for a client's own failure: that client is refused with its reason."""
        job = self._job
        if job is None:
            raise RuntimeError("a unit came before its job")
        if job.kind == EVALUATION:
            return self._evaluate(job, unit)
        return self._replies(job, unit) if job.kind == REPLIES else self._sums(job, unit)

    def data(self, client: int) -> ClientData:
        found = self._cache.get(client)
        if found is None:
            fraction = self.learner.config.data.validation_fraction
            found = client_data(self.population.examples(client), self.population.name(client), fraction, self.seed)
            self._cache.put(client, found, size_of(found))
        return found

    def _sums(self, job: Job, unit: Unit) -> UnitResult:
        aggregator = self.learner.algorithm.aggregator
        result = UnitResult(job.number, unit)
        tree = SumTree(len(unit.leaves), in_place(aggregator.merge))
        for number, leaf in enumerate(unit.leaves):
            began, counted = time.perf_counter(), len(result.facts.clients)
            state = aggregator.begin(job.request.round, self._shared(job.request))
            for found in self.path.train([self._task(client) for client in leaf], job.request):
                self._count(state, found, leaf, result.facts)
            tree.put(0, number, replace(state, reference={}))  # the model does not travel back
            examples = sum(result.facts.num_examples[counted:])
            result.timings.append((len(leaf), examples, time.perf_counter() - began))
        result.state = tree.root
        return result

    def _shared(self, request: Request) -> Arrays:
        """What clients send back: the model without their personal layers."""
        personal = personal_names(request.arrays, self.learner.config.algorithm.personal)
        return {name: array for name, array in request.arrays.items() if name not in personal}

    def _task(self, client: int) -> Task:
        return Task(self.population.name(client), lambda: self.data(client))

    def _count(self, state: State, found: Results, leaf: Sequence[int], facts: Facts) -> None:
        facts.refused |= {leaf[position]: why for position, why in found.failures.items()}
        if not len(found.positions):
            return
        plain = self._plain(found, state.reference)
        if plain and len(found.positions) > 1 and self._counted_together(state, found):
            facts.clients += [leaf[position] for position in found.positions]
            facts.num_examples += found.num_examples
            facts.metrics += found.metrics
            return
        bad = {} if plain and finite_arrays(found) else self._screened(found, leaf, state.reference)
        facts.refused |= {leaf[found.positions[i]]: why for i, why in bad.items()}
        kept = [i for i in range(len(found.positions)) if i not in bad]
        if not kept:
            return
        counts, metrics = list(found.num_examples), list(found.metrics)
        if bad:
            counts, metrics = [counts[i] for i in kept], [metrics[i] for i in kept]
        facts.clients += [leaf[found.positions[i]] for i in kept]
        facts.num_examples += counts
        facts.metrics += metrics
        arrays, extra = found.arrays, found.extra
        if bad:
            arrays, extra = {k: v[kept] for k, v in arrays.items()}, [extra[i] for i in kept] if extra else ()
        self.learner.algorithm.aggregator.add_many(state, arrays, list(map(float, counts)), extra)

    def _plain(self, found: Results, reference: Arrays) -> bool:
        """Whether all that can be wrong with these is a number that is not finite."""
        plain = self.learner.config.algorithm.max_update_norm <= 0 and not found.extra
        plain = plain and not self.learner.algorithm.aggregator.expected(reference)
        return plain and all(found.num_examples) and finite(found.metrics) and same_shapes(found, reference)

    def _counted_together(self, state: State, found: Results) -> bool:
        """Counts them where their sums are finite: a NaN or an infinity in one of them would show there."""
        aggregator = self.learner.algorithm.aggregator
        sums = aggregator.begin(state.round, state.reference)
        aggregator.add_many(sums, found.arrays, list(map(float, found.num_examples)))
        if sums.held or not all(np.isfinite(total).all() for total in sums.sums.values()):
            return False
        aggregator.merge(state, sums)
        return True

    def _screened(self, found: Results, leaf: Sequence[int], reference: Arrays) -> dict[int, str]:
        """place in the results -> why it is refused, by the rules of ``fl_server.screening``."""
        max_norm, aggregator = self.learner.config.algorithm.max_update_norm, self.learner.algorithm.aggregator
        refused = {}
        for i, position in enumerate(found.positions):
            name = self.population.name(leaf[position])
            one = {k: np.asarray(v[i]) for k, v in found.arrays.items()}
            try:
                if not finite([found.metrics[i]]):
                    raise IntegrityError(f"{name}: a metric is not finite")
                reply = Reply(num_examples=found.num_examples[i], metrics=found.metrics[i], arrays=one)
                screen_update(reply, reference, name, max_norm=max_norm)
                aggregator.screen(found.extra[i] if found.extra else {}, reference, origin=name)
            except IntegrityError as error:
                refused[i] = error.message
        return refused

    def _replies(self, job: Job, unit: Unit) -> UnitResult:
        result = UnitResult(job.number, unit)
        for client in (client for leaf in unit.leaves for client in leaf):
            name = self.population.name(client)
            try:
                result.replies[client] = train_client(self.learner, name, self.data(client), job.request)
            except Exception as error:  # an application's own code
                result.facts.refused[client] = failure(name, error)
        return result

    def _evaluate(self, job: Job, unit: Unit) -> UnitResult:
        result = UnitResult(job.number, unit)
        for client in (client for leaf in unit.leaves for client in leaf):
            name = self.population.name(client)
            try:
                reply = evaluate_client(self.learner, name, self.data(client), job.request)
                result.facts.add(client, reply.num_examples, reply.metrics)
            except Exception as error:  # an application's own code
                result.facts.refused[client] = failure(name, error)
        return result


def finite(metrics: Sequence[Any]) -> bool:
    return all(math.isfinite(value) for one in metrics for value in one.values())


def same_shapes(found: Results, reference: Arrays) -> bool:
    """Names, dtypes and shapes of the reference."""
    if set(found.arrays) != set(reference):
        return False
    for name, expected in reference.items():
        got = found.arrays[name]
        if got.dtype != expected.dtype or got.shape[1:] != expected.shape:
            return False
    return True


def finite_arrays(found: Results) -> bool:
    """A NaN or an infinity shows in the sum; where finite numbers overflow there, the least and the greatest tell."""
    floats = (array for array in found.arrays.values() if array.dtype.kind == "f" and array.size)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(np.isfinite(a.sum()) or (np.isfinite(a.min()) and np.isfinite(a.max())) for a in floats)


def size_of(data: ClientData) -> int:
    parts = (data.train, data.validation)
    return sum(a.nbytes for p in parts for a in (*p.inputs.values(), p.targets, *p.columns.values()))


class Cache:
    """The most recently used entries, up to so many bytes; one larger than that is not kept."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._entries: OrderedDict[int, tuple[ClientData, int]] = OrderedDict()

    def get(self, key: int) -> ClientData | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: int, value: ClientData, size: int) -> None:
        if size > self._limit or key in self._entries:
            return
        self._entries[key] = (value, size)
        self._used += size
        while self._used > self._limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self._used -= freed
