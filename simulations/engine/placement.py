"""Which worker trains which clients: predicted times, longest pieces of work first (Graham 1969; Pollen, arXiv 2306.17453).

A round is cut into units along the tree of ``summation``: each is a node of the tree, so that what a worker sends back
for it is one partial state. Cutting depends on predictions and on the number of workers; the tree does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulations.engine.summation import height, width

UNITS_PER_WORKER = 6  # enough to even out wrong predictions at the end of a round; each costs one partial state


@dataclass(frozen=True)
class Unit:
    """The node (level, index) of the tree. leaves: of each of its leaves, the numbers of the clients."""

    level: int
    index: int
    leaves: tuple[tuple[int, ...], ...]

    @property
    def clients(self) -> int:
        return sum(len(leaf) for leaf in self.leaves)


class TimeModel:
    """Seconds of a block of clients: ``a * clients + b * examples``, least squares with forgetting, corrected as it runs."""

    KEEP = 0.98

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of clients^2, clients * examples, examples^2, clients * seconds, examples * seconds
        self._rates: tuple[float, float] | None = (1e-4, 1e-4)  # orders clients by size until something was measured

    def predict(self, clients: int, examples: int) -> float:
        if self._rates is None:
            self._rates = self._solved()
        return self._rates[0] * clients + self._rates[1] * examples

    def learn(self, clients: int, examples: int, seconds: float) -> None:
        new = (clients * clients, clients * examples, examples * examples, clients * seconds, examples * seconds)
        self._sums = [self.KEEP * old + value for old, value in zip(self._sums, new, strict=True)]
        self._rates = None

    def _solved(self) -> tuple[float, float]:
        """The normal equations with a little ridge, by Cramer's rule."""
        a, b, c, p, q = self._sums
        ridge = 1e-6 * (a + c)
        a, c = a + ridge, c + ridge
        determinant = a * c - b * b
        return max((c * p - b * q) / determinant, 1e-9), max((a * q - b * p) / determinant, 1e-9)


def cut(
    leaves: Sequence[tuple[int, ...]], seconds: Sequence[float], workers: int, each: int = UNITS_PER_WORKER
) -> list[Unit]:
    """Units of about equal predicted time, ``each`` a worker, longest first. ``seconds``: predicted for each leaf."""
    if not leaves:
        return []
    ends = np.concatenate([[0.0], np.cumsum(seconds)])
    most = float(ends[-1]) / (workers * each)
    found: list[tuple[float, Unit]] = []
    open_nodes = [(height(len(leaves)), 0)]
    while open_nodes:
        level, index = open_nodes.pop()
        first, end = index << level, min(len(leaves), (index + 1) << level)
        time = float(ends[end] - ends[first])
        if level == 0 or time <= most:
            found.append((time, Unit(level, index, tuple(leaves[first:end]))))
            continue
        children = [2 * index, 2 * index + 1]
        open_nodes += [(level - 1, child) for child in children if child < width(len(leaves), level - 1)]
    return [unit for _, unit in sorted(found, key=lambda pair: (-pair[0], pair[1].index))]


def blocks(clients: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The leaves: consecutive clients, ``size`` in each, fewer in the last."""
    return [tuple(clients[i : i + size]) for i in range(0, len(clients), size)]
