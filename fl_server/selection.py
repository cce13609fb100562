"""Who takes part in a round: one policy for the fleet and for the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from fl_core.learning import seeding


def select(names: Sequence[str], clients_per_round: int, *, seed: int, round: int) -> tuple[str, ...]:
    """Uniformly without replacement, by (seed, round) and the sorted names; 0 = everyone. Sorted."""
    ordered = sorted(names)
    if clients_per_round <= 0 or clients_per_round >= len(ordered):
        return tuple(ordered)
    chosen = seeding.generator(seed, "selection", round).choice(len(ordered), clients_per_round, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))
