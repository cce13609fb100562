"""The global batch sampler: the same examples in the same order at any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fl_core.learning import seeding


def global_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int, world: int, unit: int = 1, start: int = 0
) -> Iterator[npt.NDArray[np.int64]]:
    """This rank's slice of each GLOBAL batch, from batch ``start`` on; never padded, never dropped.

    The permutation comes from (seed, epoch) alone. A slice holds whole units of ``unit`` consecutive examples (ghost
    batches), but for the batch's last one. The tail batch is smaller, so that a slice may be empty.
    """
    order = seeding.generator(seed, "global order", epoch).permutation(count)
    for first in range(start * batch_size, count, batch_size):
        batch = order[first : first + batch_size]
        units = np.array_split(np.arange(-(-len(batch) // unit)), world)[rank]
        yield batch[units[0] * unit : (units[-1] + 1) * unit] if len(units) else batch[:0]


def largest_share(batch_size: int, world: int, unit: int = 1) -> int:
    """Examples of the process with the most."""
    return min(batch_size, math.ceil(math.ceil(batch_size / unit) / world) * unit)


def steps_per_epoch(count: int, batch_size: int) -> int:
    return -(-count // batch_size)
