"""Classical floors to read a model's scores by: watershed on excess green; and for one class of tissue, boosted trees on pixel colours.

The threshold of the excess green is Otsu's; markers are the peaks of the
distance to the background, flooded in its order (Meyer 1994). The distance between peaks and whether to smooth are
chosen on training tiles.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation import grouping, metrics
from applications.plant_segmentation.config import Config
from fl_core.imagery.colour import excess_green, otsu
from fl_core.learning import seeding
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
TUNING_TILES, TRAINING_PIXELS = 40, 120_000
SPACINGS, SMOOTHING = (3, 5, 8, 12, 18), (0, 1)


def floor(config: Config, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Array]]:
    """Floor -> outputs on ``test``, as a model would give them."""
    if config.model.task == "semantic":
        return {"boosted trees on pixel colours": {"maps": boosted_trees(train, test, seed)}}
    rng = seeding.generator(seed, "plant floor")
    some = train.take(rng.permutation(len(train))[:TUNING_TILES])

    def quality(spacing: int, smooth: int) -> float:
        scores = []
        for image, truth in zip(some.inputs["image"], some.targets, strict=True):
            labels = watershed(image, spacing, smooth)
            scores.append(metrics.symmetric_best_dice(metrics.compare(truth, labels, np.ones(labels.max()))))
        return float(np.mean(scores))

    best = max(itertools.product(SPACINGS, SMOOTHING), key=lambda choice: quality(*choice))
    maps = [grouping.as_maps(watershed(image, *best)) for image in test.inputs["image"]]
    return {"watershed on excess green": {"maps": np.stack(maps)}}


def distance_to_ground(inside: Array) -> Array:
    """(H, W): Euclidean distance of each foreground pixel to the nearest other one, exact, in two passes of parabolas."""
    far = float(sum(inside.shape)) ** 2
    squared = np.where(inside, far, 0.0)
    for axis in (0, 1):
        squared = np.moveaxis(squared, axis, 0)
        gap = (np.arange(len(squared))[:, None] - np.arange(len(squared))) ** 2
        squared = np.stack([(squared + g[:, None]).min(0) for g in gap])
        squared = np.moveaxis(squared, 0, axis)
    return np.sqrt(squared)


def watershed(image: Array, spacing: int, smooth: int) -> npt.NDArray[np.int32]:
    """(H, W, 3) -> (H, W) numbers of plants."""
    green = excess_green(image)
    if smooth:
        green = grouping.box(np.pad(green, 1, mode="edge"), 1)[1:-1, 1:-1]
    inside = green > max(otsu(green), 0.02)
    height = distance_to_ground(inside)
    height = grouping.box(height, 1)
    peaks = inside & (height == grouping.local_maximum(height, spacing))
    return flooded(height, inside, peaks)


def flooded(height: Array, inside: Array, peaks: Array) -> npt.NDArray[np.int32]:
    """Markers grow from the highest place down; touching peak pixels are one marker."""
    labels = np.zeros(inside.shape, np.int32)
    queue: list[tuple[float, int, int, int]] = []
    order, number = itertools.count(), 0
    starts = np.argwhere(peaks)
    for row, column in starts[np.argsort(-height[peaks], kind="stable")].tolist():
        around = labels[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        number, mine = (number, int(around.max())) if around.any() else (number + 1, number + 1)
        labels[row, column] = mine
        heapq.heappush(queue, (-float(height[row, column]), next(order), row, column))
    while queue:
        _, _, row, column = heapq.heappop(queue)
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < inside.shape[0] and 0 <= x < inside.shape[1] and inside[y, x] and not labels[y, x]:
                labels[y, x] = labels[row, column]
                heapq.heappush(queue, (-float(height[y, x]), next(order), y, x))
    return labels


def colours(image: Array) -> Array:
    """(..., 3) -> (pixels, 6): red, green, blue, and hue, saturation, value."""
    rgb = image.reshape(-1, 3).astype(np.float32) / 255
    value, low = rgb.max(1), rgb.min(1)
    spread = value - low
    r, g, b = rgb.T
    with np.errstate(divide="ignore", invalid="ignore"):
        hue = np.select(
            [spread == 0, value == r, value == g],
            [0, (g - b) / spread % 6, (b - r) / spread + 2],
            (r - g) / spread + 4,
        )
    return np.column_stack([rgb, hue, spread / np.maximum(value, 1e-6), value])


def boosted_trees(train: Examples, test: Examples, seed: int) -> Array:
    """Needs scikit-learn."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    from applications.plant_segmentation.pipeline import UNLABELLED

    truth = train.targets.ravel()
    rng = seeding.generator(seed, "plant floor")
    pick = rng.permutation(np.flatnonzero(truth != UNLABELLED))[:TRAINING_PIXELS]
    trees = HistGradientBoostingClassifier(max_iter=150, learning_rate=0.1, random_state=seed)
    trees.fit(colours(train.inputs["image"].reshape(-1, 3)[pick]), truth[pick] > 0)
    made = np.zeros((len(test), 4, *test.targets.shape[1:]), np.float32)
    for i, image in enumerate(test.inputs["image"]):
        likely = trees.predict_proba(colours(image))[:, 1].clip(1e-6, 1 - 1e-6)
        made[i, 0] = np.log(likely / (1 - likely)).reshape(image.shape[:2])
    return made
