"""The global batch sampler: one order, however many processes share it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_trainer.sampler import global_batches, steps_per_epoch


def shares(count: int, size: int, world: int, *, seed: int = 0, epoch: int = 1) -> list[list[np.ndarray]]:
    """One list of batches for each rank."""
    return [list(global_batches(count, size, seed=seed, epoch=epoch, rank=r, world=world)) for r in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@given(count=st.integers(1, 100), size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(1, 5))
def test_any_world_walks_the_same_global_order(world: int, count: int, size: int, seed: int, epoch: int) -> None:
    alone = shares(count, size, 1, seed=seed, epoch=epoch)[0]
    ranks = shares(count, size, world, seed=seed, epoch=epoch)
    assert {len(r) for r in ranks} == {steps_per_epoch(count, size)} == {len(alone)}
    for step, whole in enumerate(alone):
        parts = [r[step] for r in ranks]
        assert np.concatenate(parts).tolist() == whole.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    seen = np.concatenate(alone)
    assert sorted(seen.tolist()) == list(range(count)), "nothing padded, nothing dropped"
    assert all(len(b) == size for b in alone[:-1])


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {
        tuple(np.concatenate(shares(50, 50, 1, seed=seed, epoch=epoch)[0])) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_rank_may_be_empty_in_the_tail() -> None:
    assert [len(r[-1]) for r in shares(17, 8, 3)] == [1, 0, 0]
