"""The global batch sampler: the same examples in the same order at any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fl_core.learning import seeding


def global_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int, world: int
) -> Iterator[npt.NDArray[np.int64]]:
    """This rank's slice of each GLOBAL batch; never padded, never dropped.

    The permutation comes from (seed, epoch) alone. The tail batch is smaller, so that a slice may be empty.
    """
    order = seeding.generator(seed, "global order", epoch).permutation(count)
    for start in range(0, count, batch_size):
        yield np.array_split(order[start : start + batch_size], world)[rank]


def steps_per_epoch(count: int, batch_size: int) -> int:
    return -(-count // batch_size)
