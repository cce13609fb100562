"""How the benchmarks of quality print their goals."""

from __future__ import annotations

from collections.abc import Mapping


def verdict(goals: Mapping[str, bool]) -> int:
    """Prints each goal and whether it is met; the exit code: 1 where one is missed."""
    for goal, met in goals.items():
        print(f"  {'met   ' if met else 'MISSED'} {goal}")
    return 0 if all(goals.values()) else 1
