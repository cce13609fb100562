"""Augmentation in training only, keyed by the examples' seeds: turned and mirrored tiles with their labels, other light and colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation.config import Config
from fl_core.imagery.colour import recoloured
from fl_core.learning.augmentation import Augmentation
from fl_core.learning.seeding import uniform

Keys = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]


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


def images(inputs: dict[str, Array], seeds: Keys, config: Config) -> dict[str, Array]:
    """image (N, S, S, 3) uint8 -> the same, moved, in other light."""
    image = np.asarray(inputs["image"], np.uint8)
    if len(image) == 0:
        return inputs
    return {**inputs, "image": recoloured(moved(image, seeds, config), seeds, config.data.colour)}


AUGMENTATION = Augmentation(inputs=images, targets=moved)
