"""A whole volume from overlapping sub-volumes: predicted one by one, joined without seams, in memory of a few tiles' depth.

Two ways to join, both by weights that add up to one at every voxel:

* blended (margin 0): a tile's weight falls off towards its faces over half the overlap on each side, so that no voxel's label hangs on where a
  tile ends. For models whose field of view is about a tile, and for normalisation over the tile (group norm).
* cut (margin m): what lies closer than m to an inner face of a tile does not count. With m at least the model's field of view
  (``model.receptive_radius``) the result is the one of the whole volume at once, where tiles lie on the model's coarsest
  grid (sides of the volume are multiples of it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.data import positions
from fl_core.contracts.errors import InputError
from fl_core.learning.windows import Sliceable

Array = npt.NDArray[Any]
Predict = Callable[[Array], Array]  # (N, 1, side, side, side) float32 -> (N, classes, side, side, side), kept as it is


def ramp(side: int, overlap: int) -> Array:
    """(side,): rises over ``overlap`` samples, stays at one, falls: sine squared, never zero."""
    rise = np.minimum(1.0, (np.arange(side) + 0.5) / max(overlap, 1))
    edge = np.sin(np.pi / 2 * rise) ** 2
    made: Array = np.minimum(edge, edge[::-1])
    return made


def cut(side: int, margin: int, first: bool, last: bool) -> Array:
    """(side,): zero within ``margin`` of a face, but for a face that is the volume's own."""
    weight = np.ones(side)
    if not first:
        weight[:margin] = 0
    if not last:
        weight[side - margin :] = 0
    return weight


def tile_weight(corner: tuple[int, ...], shape: tuple[int, ...], side: int, overlap: int, margin: int) -> Array:
    """(side, side, side): the product of one weight an axis."""
    made = np.ones((1, 1, 1))
    for axis, (at, length) in enumerate(zip(corner, shape, strict=True)):
        one = cut(side, margin, at == 0, at + side == length) if margin else ramp(side, overlap)
        view = [1, 1, 1]
        view[axis] = side
        made = made * one.reshape(view)
    return made.astype(np.float32)


def joined(
    predict: Predict,
    amplitude: Sliceable,
    *,
    side: int,
    classes: int,
    overlap: int,
    margin: int = 0,
    batch_size: int = 8,
    scale: float = 1.0,
) -> Iterator[tuple[int, Array]]:
    """(first inline, values (classes, inlines, crosslines, samples) float32), from the first inline to the last.

    Rows are given out as soon as no later tile reaches them, so that memory does not grow with the number of inlines.
    Raises InputError for a volume smaller than a tile, and for an overlap that leaves gaps.
    """
    shape = tuple(amplitude.shape)
    if min(shape) < side:
        raise InputError(f"a volume of {' x '.join(map(str, shape))} voxels is smaller than a tile of {side}")
    if not max(1, 2 * margin) <= overlap < side:
        raise InputError(
            f"tiles of {side} with an overlap of {overlap} and a margin of {margin} leave gaps",
            remedy=f"the overlap must be at least twice the margin, and below {side}",
        )
    across = [positions(n, side, side - overlap) for n in shape]
    sums = np.zeros((classes, side, *shape[1:]), np.float32)
    weights = np.zeros((side, *shape[1:]), np.float32)
    for number, first in enumerate(across[0]):
        corners = [(first, j, k) for j in across[1] for k in across[2]]
        for start in range(0, len(corners), batch_size):
            some = corners[start : start + batch_size]
            found = predict(np.stack([_read(amplitude, c, side, scale) for c in some])[:, None])
            for corner, values in zip(some, found, strict=True):
                weight = tile_weight(corner, shape, side, overlap, margin)
                _, j, k = corner
                sums[:, :, j : j + side, k : k + side] += weight * values
                weights[:, j : j + side, k : k + side] += weight
        done = side if number == len(across[0]) - 1 else across[0][number + 1] - first
        yield first, sums[:, :done] / weights[:done]
        if done < side:
            for array in (sums, weights):
                rows = array if array.ndim == 3 else np.moveaxis(array, 1, 0)
                rows[: side - done] = rows[done:].copy()
                rows[side - done :] = 0


def _read(amplitude: Sliceable, corner: tuple[int, ...], side: int, scale: float) -> Array:
    window = np.asarray(amplitude[tuple(slice(c, c + side) for c in corner)], np.float32)
    return window / np.float32(scale)
