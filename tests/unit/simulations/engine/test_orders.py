"""Orders drawn together are the orders drawn one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fl_core.learning import seeding
from simulations.engine.orders import drawn_in_turn, order_keys, pcg_states, permutations

KEYS = st.integers(0, 2**63 - 1)


@given(keys=st.lists(KEYS, min_size=1, max_size=8), count=st.integers(0, 60))
def test_permutations_are_numpys(keys: list[int], count: int) -> None:
    expected = [np.random.default_rng(key).permutation(count) for key in keys]
    for found in (permutations(keys, count), drawn_in_turn(keys, count)):
        np.testing.assert_array_equal(found, np.array(expected).reshape(len(keys), count))


@given(key=KEYS)
def test_states_are_numpys(key: int) -> None:
    state = np.random.PCG64(key).state["state"]
    assert pcg_states([key]) == [(state["state"], state["inc"])]


@given(names=st.lists(st.text(max_size=12), max_size=5), seed=st.integers(0, 2**31), round=st.integers(1, 999))
def test_keys_are_those_of_the_local_update(names: list[str], seed: int, round: int) -> None:
    assert order_keys(seed, round, names, 3) == [seeding.key(seed, "order", round, name, 3) for name in names]
