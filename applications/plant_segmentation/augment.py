"""Augmentation in training only, keyed by the examples' seeds: turned and mirrored tiles with their labels, other light and colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation.config import Config
from fl_core.learning.augmentation import Augmentation
from fl_core.learning.seeding import uniform

Keys = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def moved(pictures: Array, seeds: Keys, config: Config) -> Array:
    """(N, S, S, ...): the same symmetry for the image and the labels of one seed."""
    d = config.data
    made = np.array(pictures)
    mirror = uniform(seeds, 0) < d.mirror
    turns = np.where(uniform(seeds, 1) < d.turn, 1 + (3 * uniform(seeds, 2)).astype(np.int64), 0)
    shifted = uniform(seeds, 3) < d.shift
    steps = (np.stack([uniform(seeds, k) for k in (4, 5)], 1) * made.shape[1]).astype(np.int64)
    side = made.shape[1]
    for i in range(len(made)):
        one = np.rot90(made[i], turns[i])
        one = one[:, ::-1] if mirror[i] else one
        if shifted[i]:  # a window of the tile and its mirror images
            one = np.concatenate([one, one[::-1]], 0)[steps[i, 0] : steps[i, 0] + side]
            one = np.concatenate([one, one[:, ::-1]], 1)[:, steps[i, 1] : steps[i, 1] + side]
        made[i] = one
    return made


def recoloured(image: Array, seeds: Keys, strength: float) -> Array:
    """Saturation, gain of each channel, contrast about the mean grey, brightness."""
    u = [strength * (2 * uniform(seeds, 10 + k) - 1) for k in range(6)]
    saturation, contrast, brightness = 1 + u[0], 1 + u[1], 1 + u[2]
    gain = 1 + 0.5 * np.stack(u[3:6], axis=1)
    matrix = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * LUMA[:, None]
    matrix = matrix * (gain * (contrast * brightness)[:, None])[:, None, :]
    offset = (image.mean(axis=(1, 2)) @ LUMA * (1 - contrast) * brightness)[:, None, None]
    value = np.matmul(image.reshape(len(image), -1, 3).astype(np.float32), matrix.astype(np.float32))
    made: Array = np.clip(value + offset.astype(np.float32), 0, 255).astype(np.uint8).reshape(image.shape)
    return made


def images(inputs: dict[str, Array], seeds: Keys, config: Config) -> dict[str, Array]:
    """image (N, S, S, 3) uint8 -> the same, moved, in other light."""
    image = np.asarray(inputs["image"], np.uint8)
    if len(image) == 0:
        return inputs
    return {**inputs, "image": recoloured(moved(image, seeds, config), seeds, config.data.colour)}


AUGMENTATION = Augmentation(inputs=images, targets=moved)
