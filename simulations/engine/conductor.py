"""One exchange with many clients: units out to the workers, longest first, partial states in and summed in fixed order."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fl_core.algorithms.base import State
from fl_core.contracts.errors import EnvironmentFault, Interrupted
from fl_core.flower.messages import Request
from simulations.engine.placement import UNITS_PER_WORKER, TimeModel, Unit, blocks, cut
from simulations.engine.population import Population
from simulations.engine.summation import Merge, SumTree
from simulations.engine.work import SUMS, Facts, Job, UnitResult
from simulations.engine.workers import Lost, StatesLost, Workers

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
AHEAD = 2  # units that a worker has at a time: the next one is there before it asks
MAX_TRIES = 3
LEAVES = 1024  # whose numbers of examples are remembered


class Conductor:
    """Hands out units and takes results, over any Workers. block: clients in each leaf of the summation tree.

    on_clients(n): called as clients are done; with a negative number when they are to be done again.
    """

    def __init__(
        self,
        workers: Workers,
        population: Population,
        *,
        block: int,
        units_per_worker: int = UNITS_PER_WORKER,
        on_clients: Callable[[int], None] | None = None,
    ) -> None:
        self._each = units_per_worker
        self.workers, self.population, self.block = workers, population, block
        self.times = TimeModel()
        self.lost = 0
        self._on_clients = on_clients
        self._number = 0
        # Where the same clients take part in every round, so do the same leaves.
        self._examples = functools.lru_cache(LEAVES)(lambda leaf: sum(map(population.size, leaf)))

    def sums(
        self,
        request: Request,
        clients: Sequence[int],
        merge: Merge,
        stop: threading.Event | None = None,
    ) -> tuple[State | None, Facts]:
        """The partial state of all these clients (in sorted order) and the facts of each. Where partial states are lost with
        a node, all are trained again: nothing of them was counted. Raises EnvironmentFault when that goes on.
        """
        leaves = blocks(clients, self.block)
        for _ in range(MAX_TRIES):
            tree: SumTree[Any] = SumTree(len(leaves), self.workers.merging(merge))
            facts = Facts()
            for result in self.results(SUMS, request, leaves, stop):
                state = State(round=request.round, reference={}) if result.state is None else result.state
                tree.put(result.unit.level, result.unit.index, state)
                facts.extend(result.facts)
                for timing in result.timings:
                    self.times.learn(*timing)
            try:
                return None if tree.root is None else self.workers.collected(tree.root), facts
            except StatesLost as error:
                log.warning("round %d is trained again: %s", request.round, error)
                if self._on_clients is not None:
                    self._on_clients(-len(clients))
        raise EnvironmentFault(f"round {request.round}: nodes of the cluster were lost {MAX_TRIES} times")

    def results(
        self, kind: str, request: Request, leaves: Sequence[tuple[int, ...]], stop: threading.Event | None
    ) -> Iterator[UnitResult]:
        """Each unit's result once, in any order. Raises Interrupted; the workers are closed then."""
        self._number += 1
        self.workers.broadcast(Job(self._number, kind, request))
        waiting = deque(cut(leaves, [self._predicted(leaf) for leaf in leaves], self.workers.count, self._each))
        held: dict[int, list[Unit]] = {worker: [] for worker in range(self.workers.count)}
        tries: dict[tuple[int, int], int] = {}
        self._hand_out(waiting, held)
        while any(held.values()):
            if stop is not None and stop.is_set():
                self.workers.close()
                raise Interrupted("the simulation was told to stop")
            for event in self.workers.events(POLL_SECONDS):
                if isinstance(event, Lost):
                    yield from self._lost(event, held, waiting, tries)
                    continue
                result = event.result
                if result.job != self._number:
                    continue
                held[event.worker] = [u for u in held[event.worker] if _key(u) != _key(result.unit)]
                self._hand_out(waiting, held)
                if self._on_clients is not None:
                    self._on_clients(result.unit.clients)
                yield result
            self._hand_out(waiting, held)

    def _hand_out(self, waiting: deque[Unit], held: dict[int, list[Unit]]) -> None:
        """The longest unit that is left to whoever has least to do."""
        while waiting:
            worker = min(held, key=lambda w: len(held[w]))
            if len(held[worker]) >= AHEAD:
                return
            unit = waiting.popleft()
            held[worker].append(unit)
            self.workers.submit(worker, unit)

    def _lost(
        self, event: Lost, held: dict[int, list[Unit]], waiting: deque[Unit], tries: dict[tuple[int, int], int]
    ) -> Iterator[UnitResult]:
        """Its units go out again. One that costs a second worker is split into its leaves, so that in the end only the
        leaf that kills every worker is given up, with its clients refused.
        """
        self.lost += 1
        units, held[event.worker] = held[event.worker], []
        for unit in reversed(units):
            key, running = _key(unit), unit is units[0]
            tries[key] = tries.get(key, 0) + running
            if tries[key] < MAX_TRIES - 1 or (tries[key] < MAX_TRIES and unit.level == 0):
                waiting.appendleft(unit)
                continue
            if unit.level:
                first = unit.index << unit.level
                parts = [Unit(0, first + i, (leaf,)) for i, leaf in enumerate(unit.leaves)]
                tries.update({_key(part): 1 for part in parts})
                waiting.extendleft(reversed(parts))
                continue
            reason = f"the worker that trained it died {MAX_TRIES} times: {event.reason}"
            clients = [client for leaf in unit.leaves for client in leaf]
            refused = {client: f"{self.population.name(client)}: {reason}" for client in clients}
            yield UnitResult(self._number, unit, Facts(refused=refused))

    def _predicted(self, leaf: tuple[int, ...]) -> float:
        return self.times.predict(len(leaf), self._examples(leaf))


def _key(unit: Unit) -> tuple[int, int]:
    return unit.level, unit.index
