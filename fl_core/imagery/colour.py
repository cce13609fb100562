"""What several applications do with colours: other light, green tissue, smooth random fields. numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.learning.seeding import uniform

Array = npt.NDArray[Any]
Keys = npt.NDArray[np.uint64]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def recoloured(image: Array, seeds: Keys, strength: float, *, stream: int = 10) -> Array:
    """(N, H, W, 3) uint8 in other light: saturation, gain of each channel, contrast about the mean grey, brightness.

    Draws ``stream`` to ``stream + 5`` of each key. One 3 x 3 matrix and one offset an image.
    """
    u = [strength * (2 * uniform(seeds, stream + k) - 1) for k in range(6)]
    saturation, contrast, brightness = 1 + u[0], 1 + u[1], 1 + 1.5 * u[2]
    gain = 1 + 0.5 * np.stack(u[3:6], axis=1)
    matrix = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * LUMA[:, None]
    matrix = matrix * (gain * (contrast * brightness)[:, None])[:, None, :]
    offset = (image.mean(axis=(1, 2)) @ LUMA * (1 - contrast) * brightness)[:, None, None]
    value = np.matmul(image.reshape(len(image), -1, 3).astype(np.float32), matrix.astype(np.float32))
    made: Array = np.clip(value + offset.astype(np.float32), 0, 255).astype(np.uint8).reshape(image.shape)
    return made


def excess_green(image: Array) -> Array:
    """(..., 3) uint8 -> (...): 2g - r - b of the shares of the sum, from -1 to 2 (Woebbecke et al., Transactions of the ASAE 38, 1995)."""
    colour = image.astype(np.float32) + 1
    made: Array = (2 * colour[..., 1] - colour[..., 0] - colour[..., 2]) / colour.sum(-1)
    return made


def otsu(values: Array, bins: int = 64) -> float:
    """The threshold that parts ``values`` into two classes of least variance (Otsu 1979)."""
    count, edges = np.histogram(values, bins)
    middle = (edges[1:] + edges[:-1]) / 2
    below, mass = np.cumsum(count)[:-1], np.cumsum(count * middle)[:-1]
    above, rest = count.sum() - below, (count * middle).sum() - mass
    between = below * above * (mass / np.maximum(below, 1) - rest / np.maximum(above, 1)) ** 2
    return float(edges[1 + int(between.argmax())])


def smooth(rng: np.random.Generator, side: int, cells: int) -> Array:
    """(side, side): random values in [0, 1) on ``cells`` x ``cells``, blended into one another."""
    values = rng.random((cells + 1, cells + 1), np.float32)
    place = np.linspace(0, cells, side, dtype=np.float32)
    low = np.minimum(place.astype(np.int64), cells - 1)
    part = place - low
    rows = values[low] * (1 - part)[:, None] + values[low + 1] * part[:, None]
    made: Array = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return made
