"""Workers: where units of clients are run. One process or actor each, one thread, one model, its own data in memory.

``Workers`` is the seam: processes of this machine (``processes``), the calling process (``InlineWorkers``), or a
cluster's actors. A worker that dies loses its units, not the round: they are handed out again, and since a unit's result
arrives whole or not at all, every client is counted exactly once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from fl_core.algorithms.base import State
from simulations.engine.placement import Unit
from simulations.engine.summation import Merge, in_place
from simulations.engine.work import ClientWorker, Job, UnitResult

MakeWorker = Callable[[], ClientWorker]


@dataclass(frozen=True)
class Done:
    """A unit's result."""

    worker: int
    result: UnitResult


@dataclass(frozen=True)
class Lost:
    """This worker died, with all units that it had; a fresh one of the same number takes its place."""

    worker: int
    reason: str


class StatesLost(Exception):
    """Partial states that stayed with workers are gone with their node."""


class Workers(ABC):
    """``count`` workers, numbered from 0."""

    count: int

    @abstractmethod
    def broadcast(self, job: Job) -> None:
        """What the following units are about; every worker has it before its next unit, a replaced one too."""

    @abstractmethod
    def submit(self, worker: int, unit: Unit) -> None:
        """Units of one worker run in the order of submission."""

    @abstractmethod
    def events(self, timeout: float) -> list[Done | Lost]:
        """What happened; waits up to ``timeout`` seconds for the first event. Raises EnvironmentFault when workers
        cannot be replaced any more.
        """

    def merging(self, merge: Merge) -> Callable[[Any, Any], Any]:
        """How two units' states become one. Where states stay on the workers' nodes, so does the work."""
        return in_place(merge)

    def collected(self, state: Any) -> State:
        """The state that the results' merged states stand for. Raises StatesLost."""
        found: State = state
        return found

    @abstractmethod
    def close(self) -> None:
        """Ends the workers, whatever they do. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InlineWorkers(Workers):
    """One worker in the calling process: no start-up, nothing in parallel."""

    count = 1

    def __init__(self, make: MakeWorker) -> None:
        self._worker = make()
        self._units: deque[Unit] = deque()

    def broadcast(self, job: Job) -> None:
        self._worker.begin(job)

    def submit(self, worker: int, unit: Unit) -> None:
        self._units.append(unit)

    def events(self, timeout: float) -> list[Done | Lost]:
        return [Done(0, self._worker.run(self._units.popleft()))] if self._units else []

    def close(self) -> None:
        self._units.clear()
