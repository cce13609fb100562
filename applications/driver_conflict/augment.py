"""Augmentation in training only, on raw windows, keyed by the examples' seeds (never by rank or batch).

Shortened history comes from here alone: records' first windows, whose history is short because of where they lie,
are not trained on. So the length of the history is drawn without looking at the label and teaches nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_conflict import pipeline
from applications.driver_conflict.config import Config

Array = npt.NDArray[Any]
Seeds = npt.NDArray[np.uint64]
# Standard deviations of ordinary errors of calibration: zero offsets (deg/s, g) and gains.
OFFSETS = {"yaw_rate_dps": 1.0, "lat_acc_g": 0.03, "long_acc_g": 0.03}
GAIN = 0.1
GAINED_TOGETHER = (
    ("speed_vehicle_mph", "speed_gps_mph"),
    *pipeline.RADARS,
    ("yaw_rate_dps", "lat_acc_g"),
    ("long_acc_g",),
)
SIDEWAYS = ("yaw_rate_dps", "lat_acc_g")  # change sign when left and right are exchanged


class Draws:
    """(N,) uniform draws from N independent streams, one draw a call (SplitMix64)."""

    def __init__(self, seeds: Seeds) -> None:
        self._state = seeds.astype(np.uint64)

    def uniform(self) -> npt.NDArray[np.float64]:
        """In [0, 1)."""
        self._state = self._state + np.uint64(0x9E3779B97F4A7C15)
        z = (self._state ^ (self._state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        result: npt.NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return result

    def error(self) -> npt.NDArray[np.float64]:
        """Uniform with mean 0 and standard deviation 1."""
        result: npt.NDArray[np.float64] = (self.uniform() - 0.5) * np.sqrt(12.0)
        return result


def augment(inputs: dict[str, Array], seeds: Seeds, config: Config) -> dict[str, Array]:
    """window (N, T, C) -> the same with errors of calibration, mirrored, with silent sensors and shortened history."""
    d = config.data
    window: Array = np.array(inputs["window"], np.float32)
    draws = Draws(seeds)
    for names in GAINED_TOGETHER:
        gain = 1 + d.calibration * GAIN * draws.error()
        for name in names:
            window[:, :, pipeline.index(name)] *= gain[:, None].astype(np.float32)
    for name, size in OFFSETS.items():
        offset = d.calibration * size * draws.error()
        window[:, :, pipeline.index(name)] += offset[:, None].astype(np.float32)
    sign = np.where(draws.uniform() < d.mirror, -1, 1).astype(np.float32)
    for name in SIDEWAYS:
        window[:, :, pipeline.index(name)] *= sign[:, None]
    for names in pipeline.SENSORS.values():
        silent = draws.uniform() < d.drop_sensor
        for name in names:
            window[silent, :, pipeline.index(name)] = np.nan
    return {**inputs, "window": _shorten(window, draws, d.truncate)}


def _shorten(window: Array, draws: Draws, share: float) -> Array:
    """NaN in up to the first 5 s of a ``share`` of the windows; the judged 3 s stay."""
    longest = pipeline.CONTEXT_ROWS - pipeline.WINDOW_ROWS
    chosen, length = draws.uniform() < share, np.ceil(draws.uniform() * longest)
    cut = np.where(chosen, length, 0)
    window[np.arange(pipeline.CONTEXT_ROWS)[None] < cut[:, None]] = np.nan
    return window
