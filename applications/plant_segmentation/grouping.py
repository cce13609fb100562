"""From the model's maps to instances, in numpy, outside the graph: every foreground pixel votes for its plant's centre.

Votes after Kendall, Gal and Cipolla (CVPR 2018) and Neven et al. (CVPR 2019): a pixel's vote weighs as much as it is
foreground and a seed. Peaks of the smoothed votes are the centres; a pixel belongs to the centre that its vote is nearest to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation.config import ModelConfig

Array = npt.NDArray[Any]
OFFSET = 16.0  # pixels in one unit of the offset maps
SEEDLESS = 0.2  # weight of the vote of a pixel that is no seed
SMOOTH = 2  # half width of the box, applied twice, that smooths the votes
CHUNK = 1 << 22  # votes x centres at once


@dataclass(frozen=True)
class Instances:
    """labels: (H, W) int32, 0 = ground, k = instance k; scores: (K,) confidence of instance k + 1."""

    labels: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float64]


def sigmoid(logit: Array) -> Array:
    made: Array = 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, np.float32)))
    return made


def instances(maps: Array, model: ModelConfig) -> Instances:
    """maps: (4, H, W). Instances are numbered from the strongest centre on."""
    likely = sigmoid(maps[0])
    inside = likely > 0.5
    if model.task == "semantic":
        mean = float(likely[inside].mean()) if inside.any() else 0.0
        return Instances(inside.astype(np.int32), np.full(int(inside.any()), mean))
    rows, columns = np.nonzero(inside)
    labels = np.zeros(inside.shape, np.int32)
    if not len(rows):
        return Instances(labels, np.zeros(0))
    offset = OFFSET * maps[1:3, rows, columns].astype(np.float64)
    votes = np.stack([rows + offset[0], columns + offset[1]], 1)
    weight = likely[rows, columns] * (SEEDLESS + sigmoid(maps[3, rows, columns]))
    least = SEEDLESS * model.min_pixels / (2 * SMOOTH + 1) ** 2  # the peak that so many pixels without a seed make
    found = centres(votes, weight, inside.shape, model.min_distance, least)
    owner = nearest(votes, found)
    size = np.bincount(owner, minlength=len(found))
    kept = size >= model.min_pixels
    if not kept.any():
        kept[np.argmax(size)] = True
    if not kept.all():
        found = found[kept]
        owner = nearest(votes, found)
    size = np.bincount(owner, minlength=len(found))
    spread = np.linalg.norm(votes - found[owner], axis=1)
    certain = np.bincount(owner, likely[rows, columns] / (1 + spread / OFFSET), len(found))
    labels[rows, columns] = owner + 1
    return Instances(labels, certain / np.maximum(size, 1))


def centres(votes: Array, weight: Array, shape: tuple[int, ...], distance: int, least: float) -> Array:
    """(K, 2) rows and columns of the peaks of ``least`` or more, strongest first; one at least. Votes may point outside the picture."""
    pad = int(OFFSET)
    height, width = shape[0] + 2 * pad, shape[1] + 2 * pad
    at = np.clip(np.rint(votes).astype(np.int64) + pad, 0, (height - 1, width - 1))
    mass = np.bincount(at[:, 0] * width + at[:, 1], weight, height * width).reshape(height, width)
    for _ in range(2):
        mass = box(mass, SMOOTH)
    peak = (mass == local_maximum(mass, distance)) & (mass > 0)
    rows, columns = np.nonzero(peak)
    strength = mass[rows, columns]
    order = np.argsort(-strength, kind="stable")
    order = order[: max(1, int((strength >= least).sum()))]
    chosen: list[int] = []
    for k in order.tolist():  # a plateau has several maxima
        if all((rows[k] - rows[j]) ** 2 + (columns[k] - columns[j]) ** 2 >= distance**2 for j in chosen):
            chosen.append(k)
    return np.stack([rows[chosen], columns[chosen]], 1).astype(np.float64) - pad


def box(values: Array, half: int) -> Array:
    """Mean over (2 half + 1)^2 pixels, zero outside."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (half + 1, half)
        sums = np.cumsum(np.pad(values, pad), axis=axis)
        n = values.shape[axis]
        values = (
            np.take(sums, np.arange(2 * half + 1, 2 * half + 1 + n), axis) - np.take(sums, np.arange(n), axis)
        ) / (2 * half + 1)
    return values


def local_maximum(values: Array, half: int) -> Array:
    """The largest value within ``half`` pixels along both axes."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (half, half)
        padded = np.pad(values, pad)
        n = values.shape[axis]
        values = np.max([np.take(padded, np.arange(k, k + n), axis) for k in range(2 * half + 1)], axis=0)
    return values


def nearest(votes: Array, found: Array) -> npt.NDArray[np.int64]:
    """(V,): the number of the nearest centre, in pieces that bound the memory."""
    step = max(1, CHUNK // len(found))
    parts = [((votes[i : i + step, None] - found[None]) ** 2).sum(-1).argmin(1) for i in range(0, len(votes), step)]
    return np.concatenate(parts)


def as_maps(labels: Array) -> npt.NDArray[np.float32]:
    """(H, W) instances -> the maps (4, H, W) of a model that is sure of them: what classical methods hand to the metrics."""
    maps = np.zeros((4, *labels.shape), np.float32)
    maps[0] = np.where(labels > 0, 10, -10)
    maps[3] = -10
    numbers, owner = np.unique(labels[labels > 0], return_inverse=True)
    if len(numbers):
        places = np.stack(np.nonzero(labels > 0))
        size = np.bincount(owner)
        for axis in (0, 1):
            centre = np.bincount(owner, places[axis]) / size
            maps[1 + axis][labels > 0] = (centre[owner] - places[axis]) / OFFSET
    return maps
