"""Augmentation in training only, keyed by the examples' seeds (never by rank or batch), blind to labels.

Cameras and kinematics that are absent at random teach the model to do without any of them; without clips that have
kinematics alone it learns to read them only beside what it sees, and leaves in them what they say by themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_attention.config import Config

Array = npt.NDArray[Any]
Seeds = npt.NDArray[np.uint64]


def uniform(seeds: Seeds, draw: int) -> npt.NDArray[np.float64]:
    """(N,) in [0, 1): number ``draw`` of N independent streams (SplitMix64)."""
    z = seeds.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (draw + 1)) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    result: npt.NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def augment(inputs: dict[str, Array], seeds: Seeds, config: Config) -> dict[str, Array]:
    """frames (N, V, T, H, W) with other light, from cameras a little askew; present (N, V, T) with absent views; kinematics
    (N, T, C) absent at times; and clips that begin late."""
    d = config.data
    present = np.array(inputs["present"], np.float32)
    kinematics = np.array(inputs["kinematics"], np.float32)
    frames: Array = np.array(inputs["frames"])
    count, views = present.shape[:2]
    stays = (uniform(seeds, 0) * views).astype(np.int64)
    blind = (uniform(seeds, 60) < d.drop_all_views) & ~np.isnan(kinematics).all(axis=(1, 2))
    for view in range(views):
        absent = blind | ((uniform(seeds, 1 + view) < d.drop_view) & (stays != view))
        present[absent, view] = 0
        gain = 1 + d.light * (2 * uniform(seeds, 10 + view) - 1)
        shift = 60 * d.light * (2 * uniform(seeds, 20 + view) - 1)
        table = np.arange(256) * gain[:, None] + shift[:, None]
        table = np.clip(table, 0, 255).astype(np.uint8)
        down, aside = (_steps(seeds, 40 + 2 * view + k, d.shift, frames.shape[3 + k]) for k in range(2))
        for i in range(count):
            frames[i, view] = table[i][frames[i, view]][:, down[i][:, None], aside[i]] if present[i, view].any() else 0
    times = present.shape[2]
    begins = np.where(uniform(seeds, 31) < d.late_start, np.ceil(uniform(seeds, 32) * (times // 2)), 0)
    late = np.arange(times) < begins[:, None]
    present *= ~late[:, None]
    kinematics[late] = np.nan
    frames[present == 0] = 0
    kinematics[(uniform(seeds, 30) < d.drop_kinematics) & ~blind] = np.nan
    return {**inputs, "frames": frames, "present": present, "kinematics": kinematics}


def _steps(seeds: Seeds, draw: int, share: float, size: int) -> npt.NDArray[np.int64]:
    """(N, size): which row (or column) each one shows, all moved by a whole number; what comes in repeats the edge."""
    by = np.rint((2 * uniform(seeds, draw) - 1) * share * size).astype(np.int64)
    shown: npt.NDArray[np.int64] = np.clip(np.arange(size) + by[:, None], 0, size - 1)
    return shown
