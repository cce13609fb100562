"""Ways to do the local updates of some clients. The sequential one is the oracle; every other is held to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fl_core.contracts.arrays import Arrays
from fl_core.flower.messages import Request
from fl_core.learning.examples import ClientData


@dataclass(frozen=True)
class Task:
    """One client to train. ``data()`` reads its examples, and may raise what the application's own code raises."""

    client: str
    data: Callable[[], ClientData]


@dataclass
class Results:
    """What some of the tasks came to. positions: which, in the order of the tasks; arrays: (K, ...) for K positions.

    failures: position -> reason, for tasks that gave no update at all.
    """

    positions: Sequence[int]
    arrays: Arrays
    num_examples: Sequence[int]
    metrics: Sequence[Mapping[str, float]]
    extra: Sequence[Arrays] = ()
    failures: Mapping[int, str] = field(default_factory=dict)


class Path(Protocol):
    """``block``: how many clients it takes at once; they are handed to it in blocks of this size."""

    name: str
    block: int

    def train(self, tasks: Sequence[Task], request: Request) -> Iterator[Results]:
        """Every task once, in any grouping."""
