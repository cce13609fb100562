"""A whole photograph from overlapping tiles: predicted one by one, joined without seams before plants are grouped.

Two ways to join, both by weights that add up to one at every pixel:

* blended (margin 0): a tile's weight falls off towards its edges over half the overlap on each side, so that no pixel hangs on where a
  tile ends. For normalisation over the tile (group norm) and where tiles are not much larger than the model's field of view.
* cut (margin m): what lies closer than m to an inner edge of a tile does not count. With m at least the model's field of view
  (``model.receptive_radius``) and no normalisation over the tile the result is the one of the whole photograph at once, where tiles
  lie on the model's coarsest grid (the sides of the photograph are multiples of it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation.data import padded, positions
from applications.plant_segmentation.pipeline import MAPS
from fl_core.contracts.errors import InputError

Array = npt.NDArray[Any]
Predict = Callable[[Array], Array]  # (N, side, side, 3) uint8 -> (N, 4, side, side)


def mirrored(predict: Predict) -> Predict:
    """The mean over the tile and its three mirror images, each turned back: four times the work, smoother maps."""

    def mean(batch: Array) -> Array:
        total = np.zeros((len(batch), MAPS, *batch.shape[1:3]), np.float32)
        for rows in (1, -1):
            for columns in (1, -1):
                maps = np.array(predict(np.ascontiguousarray(batch[:, ::rows, ::columns])))[:, :, ::rows, ::columns]
                total += (
                    maps * np.array([1, rows, columns, 1], np.float32)[:, None, None]
                )  # the way to a centre turns, too
        return total / 4

    return mean


def ramp(side: int, overlap: int) -> Array:
    """(side,): rises over ``overlap`` pixels, stays at one, falls: sine squared, never zero."""
    edge = np.sin(np.pi / 2 * np.minimum(1.0, (np.arange(side) + 0.5) / max(overlap, 1))) ** 2
    made: Array = np.minimum(edge, edge[::-1])
    return made


def cut(side: int, margin: int, first: bool, last: bool) -> Array:
    """(side,): zero within ``margin`` of an edge, but for an edge that is the photograph's own."""
    weight = np.ones(side)
    weight[: 0 if first else margin] = 0
    weight[side if last else side - margin :] = 0
    return weight


def joined(predict: Predict, image: Array, *, side: int, overlap: int, margin: int = 0, batch_size: int = 8) -> Array:
    """(H, W, 3) uint8 -> maps (4, H, W) float32. Photographs smaller than a tile are mirrored up to one.

    Raises InputError for an overlap that leaves gaps.
    """
    if not max(1, 2 * margin) <= overlap < side:
        raise InputError(
            f"tiles of {side} with an overlap of {overlap} and a margin of {margin} leave gaps",
            remedy="the overlap must be at least twice the margin, and below the side of a tile",
        )
    height, width = image.shape[:2]
    image = padded(image, side, None)
    shape = image.shape[:2]
    corners = [
        (i, j) for i in positions(shape[0], side, side - overlap) for j in positions(shape[1], side, side - overlap)
    ]
    sums, weights = np.zeros((MAPS, *shape), np.float32), np.zeros(shape, np.float32)
    for start in range(0, len(corners), batch_size):
        some = corners[start : start + batch_size]
        found = predict(np.stack([image[i : i + side, j : j + side] for i, j in some]))
        for corner, maps in zip(some, found, strict=True):
            one = [
                cut(side, margin, c == 0, c + side == n) if margin else ramp(side, overlap)
                for c, n in zip(corner, shape, strict=True)
            ]
            weight = np.outer(*one).astype(np.float32)
            place = slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side)
            sums[:, *place] += weight * maps
            weights[place] += weight
    made: Array = (sums / weights)[:, :height, :width]
    return made
