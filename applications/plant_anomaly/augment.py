"""Augmentation in training only, keyed by the examples' seeds: other light, turned images, and made-up lesions.

A made-up lesion (after DRAEM, Zavrtanik et al., ICCV 2021, and CutPaste, Li et al., CVPR 2021) teaches two things without a single sick plant: to
reconstruct the plant as it was before, and to mark what is new. Lesions are painted on green tissue alone: blotches with ragged
edges, scattered spots, streaks, faded patches, of many colours, so that no one disease is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly.config import Config
from fl_core.imagery.colour import LUMA, excess_green, otsu, recoloured, smooth
from fl_core.learning.augmentation import Augmentation
from fl_core.learning.seeding import uniform

Keys = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]
COLOURS = np.array(  # dark brown, brown, tan, straw, orange, yellow, grey, black, pale
    [
        *([60, 40, 25], [105, 70, 40], [165, 130, 85], [205, 185, 130], [165, 85, 30]),
        *([200, 190, 70], [140, 135, 125], [25, 22, 20], [215, 215, 190]),
    ],
    np.float32,
)
KINDS = ("blotches", "spots", "streaks", "faded")
COUNTS = {"blotches": (1, 5), "spots": (4, 40), "streaks": (1, 10), "faded": (1, 2)}  # least, and one above the most
LENGTHS = {
    "blotches": (0.03, 0.16),
    "spots": (0.008, 0.03),
    "streaks": (0.04, 0.16),
    "faded": (0.12, 0.4),
}  # of the side
GREEN = 0.05  # excess green below which no pixel is tissue
MARKED = 0.35  # opacity from which a pixel counts as lesion


def moved(pictures: Array, seeds: Keys, chance: float) -> Array:
    """(N, S, S, C): mirrored and turned by quarter turns."""
    made = np.array(pictures)
    mirror = uniform(seeds, 0) < 0.5 * chance
    turns = np.where(uniform(seeds, 1) < chance, (4 * uniform(seeds, 2)).astype(np.int64), 0)
    for i in range(len(made)):
        one = np.rot90(made[i], turns[i])
        made[i] = one[:, ::-1] if mirror[i] else one
    return made


def clean(image: Array, seeds: Keys, config: Config) -> tuple[Array, Array]:
    """(image, tissue): moved and recoloured, and where it is green, which is told before the colours change."""
    turned = moved(image, seeds, config.data.rotate)
    excess = excess_green(turned)
    limit = np.array([max(GREEN, otsu(one)) for one in excess])
    return recoloured(turned, seeds, config.data.colour), excess > limit[:, None, None]


def painted(image: Array, tissue: Array, key: int) -> tuple[Array, Array]:
    """(S, S, 3) uint8 -> the same with made-up lesions on its tissue (S, S), and where they are (S, S) bool."""
    rng = np.random.default_rng(key)
    side = len(image)
    colour = image.astype(np.float32)
    places = np.argwhere(tissue)
    if len(places) < 8:
        return image, np.zeros((side, side), bool)
    kind = KINDS[rng.integers(len(KINDS))]
    cover = np.zeros((side, side), np.float32)
    ragged = smooth(rng, side, int(rng.integers(8, 24)))
    low, high = COUNTS[kind]
    for row, column in places[rng.integers(len(places), size=int(rng.integers(low, high)))]:
        long = side * rng.uniform(*LENGTHS[kind])
        wide = max(0.7, long * (rng.uniform(0.12, 0.35) if kind == "streaks" else rng.uniform(0.55, 1.0)))
        reach = int(1.6 * long) + 2
        top, left = max(0, row - reach), max(0, column - reach)
        part = slice(top, row + reach + 1), slice(left, column + reach + 1)
        y, x = np.ogrid[top : min(side, row + reach + 1), left : min(side, column + reach + 1)]
        turn = rng.uniform(0, np.pi)
        along = ((y - row) * np.sin(turn) + (x - column) * np.cos(turn)) / max(long, 0.7)
        across = ((y - row) * np.cos(turn) - (x - column) * np.sin(turn)) / wide
        inside = 1.0 - np.sqrt(along**2 + across**2) + 0.9 * (ragged[part] - 0.5)
        cover[part] = np.maximum(cover[part], np.clip(inside * rng.uniform(1.5, 5.0), 0, 1))
    base = COLOURS[rng.integers(len(COLOURS))] * rng.uniform(0.7, 1.3) + rng.normal(0, 10, 3)
    light = colour @ LUMA
    texture = 0.55 + 0.45 * light / max(float(light[tissue].mean()), 1.0)
    tone = base * (texture * (0.85 + 0.3 * smooth(rng, side, 32)))[..., None]
    cover *= rng.uniform(0.5, 1.0) * tissue
    if kind in ("blotches", "spots") and rng.random() < 0.5:  # a yellow halo
        halo = np.clip(cover * 3, 0, 1) * tissue * rng.uniform(0.2, 0.6)
        colour += halo[..., None] * (COLOURS[5] * texture[..., None] - colour)
    colour += cover[..., None] * (tone - colour)
    made = np.clip(colour, 0, 255).astype(np.uint8)
    return made, cover > MARKED


def images(inputs: dict[str, Array], seeds: Keys, config: Config) -> dict[str, Array]:
    """image (N, S, S, 3) uint8 -> the same, moved, in other light, a share of them with made-up lesions."""
    image = np.asarray(inputs["image"], np.uint8)
    if len(image) == 0:
        return inputs
    made, tissue = clean(image, seeds, config)
    for i in np.flatnonzero(uniform(seeds, 20) < config.data.paint):
        made[i] = painted(made[i], tissue[i], int(seeds[i]))[0]
    return {**inputs, "image": made}


def targets(truth: Array, seeds: Keys, config: Config) -> Array:
    """(N, S, S, 4) -> the image before the lesions were painted, and where they were."""
    if len(truth) == 0:
        return truth
    made = np.empty_like(truth)
    made[..., :3], tissue = clean(truth[..., :3], seeds, config)
    made[..., 3] = moved(truth[..., 3:], seeds, config.data.rotate)[..., 0]
    for i in np.flatnonzero(uniform(seeds, 20) < config.data.paint):
        marked = painted(made[i, ..., :3], tissue[i], int(seeds[i]))[1]
        made[i, ..., 3] = np.where(marked, 1, made[i, ..., 3])
    return made


AUGMENTATION = Augmentation(inputs=images, targets=targets)
