"""Partial states summed along a fixed binary tree, so that the bits do not depend on who summed what, and when.

Floating-point addition is not associative: sums by worker would differ in their last bits with the number of workers.
The leaves of the tree are fixed blocks of a round's clients, in the order of their names; whoever holds both halves of
a node adds them, left to right. A worker sends the largest nodes it could complete, not its clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from fl_core.algorithms.base import State

T = TypeVar("T")
Merge = Callable[[State, State], None]  # an aggregator's: counts in the first what the second has counted


def in_place(merge: Merge) -> Callable[[State, State], State]:
    def merged(left: State, right: State) -> State:
        merge(left, right)
        return left

    return merged


class SumTree(Generic[T]):
    """``put`` nodes in any order; ``root`` is there when all leaves are. merge(left, right): the state of both."""

    def __init__(self, leaves: int, merge: Callable[[T, T], T]) -> None:
        self._leaves, self._merge = leaves, merge
        self._waiting: dict[tuple[int, int], T] = {}
        self.root: T | None = None

    def put(self, level: int, index: int, state: T) -> None:
        """The sum of the leaves from ``index << level`` on, as many as ``1 << level`` (fewer at the end)."""
        while (count := width(self._leaves, level)) > 1:
            sibling = index ^ 1
            if sibling < count:
                other = self._waiting.pop((level, sibling), None)
                if other is None:
                    self._waiting[level, index] = state
                    return
                left, right = (state, other) if index < sibling else (other, state)
                state = self._merge(left, right)
            level, index = level + 1, index >> 1
        self.root = state


def width(leaves: int, level: int) -> int:
    """Nodes of this level."""
    return -(-leaves // (1 << level))


def height(leaves: int) -> int:
    """The root's level."""
    return (leaves - 1).bit_length() if leaves else 0
