"""What layers may know of the micro-batch under way: how many of its samples are real, and each sample's random key.

One value for the whole process, not for each thread: recomputation and backward passes run on autograd's own threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """real: the first samples that count; those behind them only fill the shape. None: all are real.

    keys: (N,) uint64, one for each sample, from (seed, epoch, sample); None outside a training step.
    recomputed: the forward pass is being repeated for its activations; statistics must not move again.
    """

    real: int | None = None
    keys: npt.NDArray[np.uint64] | None = None
    recomputed: bool = False


_current = MicroBatch()


def current() -> MicroBatch:
    return _current


@contextlib.contextmanager
def micro_batch(batch: MicroBatch) -> Iterator[None]:
    """Holds through the forward AND the backward pass of the micro-batch."""
    global _current
    before, _current = _current, batch
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    with micro_batch(replace(_current, recomputed=True)):
        yield
