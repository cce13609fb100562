"""Augmentation in training only, keyed by the examples' seeds: mirrored and exchanged lateral axes, gain.

Depth keeps its direction: facies are read from top to bottom, and a wavelet has a front and a back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.config import Config
from fl_core.learning.augmentation import Augmentation
from fl_core.learning.seeding import uniform

Keys = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]


def moved(volumes: Array, seeds: Keys, config: Config) -> Array:
    """(N, ..., inline, crossline, depth): the same lateral symmetry for the amplitudes and the labels of one seed."""
    d = config.data
    made = np.array(volumes)
    draws = [uniform(seeds, k) < p for k, p in enumerate((d.mirror, d.mirror, d.turn))]
    for i, (inline, crossline, turn) in enumerate(zip(*draws, strict=True)):
        one = made[i]
        if inline:
            one = np.flip(one, -3)
        if crossline:
            one = np.flip(one, -2)
        if turn:
            one = np.swapaxes(one, -3, -2)
        made[i] = one.copy()
    return made


def amplitudes(inputs: dict[str, Array], seeds: Keys, config: Config) -> dict[str, Array]:
    """amplitude (N, 1, D, H, W) float32 -> the same, moved, with another gain."""
    made = moved(inputs["amplitude"], seeds, config)
    normal = np.sqrt(-2 * np.log1p(-uniform(seeds, 3))) * np.cos(2 * np.pi * uniform(seeds, 4))
    factor = np.exp(config.data.gain * normal)
    return {**inputs, "amplitude": made * factor.astype(np.float32)[:, None, None, None, None]}


AUGMENTATION = Augmentation(inputs=amplitudes, targets=moved)
