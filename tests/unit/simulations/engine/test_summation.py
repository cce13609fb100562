"""Partial sums: the same bits whoever summed what; units are nodes of one fixed tree."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fl_core.algorithms.base import MeanAggregator, State, Update
from simulations.engine.placement import TimeModel, blocks, cut
from simulations.engine.summation import SumTree, in_place

AGGREGATOR = MeanAggregator()


def leaf_state(value: float) -> State:
    state = AGGREGATOR.begin(1, {})
    AGGREGATOR.add(state, Update(arrays={"w": np.array([value])}, weight=1.0))
    return state


def by_recursion(values: list[float]) -> float:
    """The tree's slow twin: the left subtree is the largest power of two that leaves something for the right."""
    if len(values) == 1:
        return 0.0 + values[0]
    left = 1 << ((len(values) - 1).bit_length() - 1)
    return by_recursion(values[:left]) + by_recursion(values[left:])


@given(
    values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40),
    workers=st.integers(1, 5),
    seconds=st.lists(st.floats(0.01, 100), min_size=40, max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_sums_have_the_same_bits_in_any_order_of_arrival(
    values: list[float], workers: int, seconds: list[float], order: object
) -> None:
    leaves = blocks(range(len(values)), 1)
    units = cut(leaves, seconds[: len(values)], workers)
    assert sorted(c for unit in units for leaf in unit.leaves for c in leaf) == list(range(len(values)))
    order.shuffle(units)  # type: ignore[attr-defined]
    whole = SumTree(len(leaves), in_place(AGGREGATOR.merge))
    for unit in units:
        part = SumTree(len(unit.leaves), in_place(AGGREGATOR.merge))
        for i in reversed(range(len(unit.leaves))):
            part.put(0, i, leaf_state(values[unit.leaves[i][0]]))
        assert part.root is not None
        whole.put(unit.level, unit.index, part.root)
    assert whole.root is not None
    assert whole.root.count == len(values)
    assert whole.root.sums["w"][0] == by_recursion(values)


def test_a_round_is_cut_by_workers_not_by_clients() -> None:
    for clients in (100, 10_000):
        units = cut(blocks(range(clients), 4), [1.0] * (clients // 4), 2)
        assert len(units) <= 32


def test_longest_units_go_first() -> None:
    units = cut(blocks(range(8), 1), [9.0, 1, 1, 1, 1, 1, 1, 8], 2)
    assert [unit.leaves[0][0] for unit in units[:2]] == [0, 7]


def test_times_are_learned() -> None:
    model = TimeModel()
    for clients, examples in ((4, 100), (4, 900), (1, 10), (4, 250)):
        model.learn(clients, examples, 0.02 * clients + 0.003 * examples)
    assert abs(model.predict(3, 500) - (0.06 + 1.5)) < 0.02
