"""Who takes part in a round: one policy for the fleet and for the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fl_core.learning import seeding


@dataclass(frozen=True)
class Choice:
    """Who is asked in a round, sorted by name; ``skipped``: who was passed over for a reason, and the reason."""

    chosen: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


class Selector(Protocol):
    """Policy without I/O apart from what it is told of the devices."""

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        """At most ``count`` of ``names`` (0 = all that may), the same ones for the same round and device states."""


class UniformSelector:
    """Everyone who is there may be chosen."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        return Choice(select(names, count, seed=self._seed, round=round))


def select(names: Sequence[str], clients_per_round: int, *, seed: int, round: int) -> tuple[str, ...]:
    """Uniformly without replacement, by (seed, round) and the sorted names; 0 = everyone. Sorted."""
    ordered = sorted(names)
    if clients_per_round <= 0 or clients_per_round >= len(ordered):
        return tuple(ordered)
    chosen = seeding.generator(seed, "selection", round).choice(len(ordered), clients_per_round, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))
