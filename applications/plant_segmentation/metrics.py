"""Scores of instance segmentation: average precision as COCO counts it, and the leaf counting challenge's measures.

* ``ap50``, ``ap50_95``: area under the interpolated precision-recall curve (101 recalls), matches by mask IoU in the order of
  confidence (Lin et al., ECCV 2014), at IoU 0.5 and as the mean over 0.5, 0.55, ..., 0.95; ``ap50_small`` and so on: of plants
  below SMALL pixels, above LARGE, and between; other plants, and what is found of them, do not count.
* ``symmetric_best_dice``: the smaller of the mean best Dice of truth against prediction and of prediction against truth;
  ``count_difference``: |found - true| plants (Scharr et al., Machine Vision and Applications 27, 2016). Means over tiles.
* ``foreground_dice``, ``foreground_iou``: of all pixels of all tiles together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation import grouping
from applications.plant_segmentation.config import Config
from applications.plant_segmentation.pipeline import UNLABELLED
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.runtime import scores as shared

Array = npt.NDArray[Any]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
SMALL, LARGE = 12**2, 24**2  # pixels
SIZES = {"small": (0, SMALL), "medium": (SMALL, LARGE), "large": (LARGE, 1 << 60)}
MAX_GROUPS = 16


@dataclass(frozen=True)
class Found:
    """One picture. overlap: (T, P) pixels that truth t and prediction p share; sizes in pixels; scores (P,)."""

    overlap: Array
    true_size: Array
    found_size: Array
    scores: Array

    @property
    def iou(self) -> Array:
        union = self.true_size[:, None] + self.found_size[None] - self.overlap
        made: Array = self.overlap / np.maximum(union, 1)
        return made

    @property
    def dice(self) -> Array:
        made: Array = 2 * self.overlap / np.maximum(self.true_size[:, None] + self.found_size[None], 1)
        return made


def compare(truth: Array, labels: Array, scores: Array) -> Found:
    """truth, labels: (H, W) numbers, 0 = ground; where truth is UNLABELLED nothing counts. A prediction of which no pixel
    counts is dropped."""
    known = truth != UNLABELLED
    true_ids, t = np.unique(np.where(known, truth, 0), return_inverse=True)
    kept = np.where(known, labels, 0)
    table = np.zeros((len(true_ids), len(scores) + 1), np.int64)
    np.add.at(table, (t.ravel(), kept.ravel()), 1)
    sizes = table.sum(0)[1:]
    overlap = table[1:] if true_ids[0] == 0 else table
    seen = sizes > 0
    return Found(overlap[:, 1:][:, seen], overlap.sum(1), sizes[seen], np.asarray(scores)[seen])


def symmetric_best_dice(found: Found) -> float:
    """1 where there is nothing and nothing was found."""
    t, p = found.overlap.shape
    if not t or not p:
        return float(t == p)
    return float(min(found.dice.max(1).mean(), found.dice.max(0).mean()))


def average_precision(pictures: list[Found], threshold: float, size: tuple[int, int] = (0, 1 << 60)) -> float | None:
    """None where there is no plant of that size."""
    low, high = size
    scores, hits, counted, total = [], [], [], 0
    for picture in pictures:
        ignored = (picture.true_size < low) | (picture.true_size >= high)
        total += int((~ignored).sum())
        iou, taken = picture.iou, np.zeros(len(ignored), bool)
        for p in np.argsort(-picture.scores, kind="stable"):
            best = _best(iou[:, p], taken, ignored, threshold)
            outside = not low <= picture.found_size[p] < high
            if best >= 0:
                taken[best] = True
            scores.append(picture.scores[p])
            hits.append(best >= 0 and not ignored[best])
            counted.append(not ignored[best] if best >= 0 else not outside)
    if not total:
        return None
    order = np.argsort(-np.array(scores), kind="stable")
    order = order[np.array(counted, bool)[order]] if len(order) else order
    true = np.cumsum(np.array(hits, np.int64)[order]) if len(order) else np.zeros(0)
    if not len(true):
        return 0.0
    precision = true / np.arange(1, len(true) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(true / total, RECALLS, side="left")
    return float(np.where(at < len(envelope), envelope[np.minimum(at, len(envelope) - 1)], 0.0).mean())


def _best(iou: Array, taken: Array, ignored: Array, threshold: float) -> int:
    """The free true instance that overlaps most, one that counts before one that does not; -1 = none reaches the threshold."""
    for part in (~ignored, ignored):
        free = np.where(part & ~taken, iou, -1.0)
        if len(free) and free.max() >= threshold:
            return int(free.argmax())
    return -1


def scored(pictures: list[Found]) -> dict[str, float]:
    """Of instances in whole pictures or in tiles."""
    if not pictures:
        return {}
    each = [average_precision(pictures, t) for t in THRESHOLDS]
    sizes = {f"ap50_{name}": average_precision(pictures, 0.5, size) for name, size in SIZES.items()}
    return shared.defined(
        symmetric_best_dice=float(np.mean([symmetric_best_dice(p) for p in pictures])),
        count_difference=float(np.mean([abs(len(p.scores) - len(p.true_size)) for p in pictures])),
        ap50=each[0],
        ap50_95=None if each[0] is None else float(np.mean([v for v in each if v is not None])),
        **sizes,
    )


def foreground(counts: Array) -> dict[str, float]:
    """counts: (pixels of both, of the truth, of the prediction)."""
    both, true, made = (float(c) for c in counts)
    if true + made == 0:
        return {}
    return {"foreground_dice": 2 * both / (true + made), "foreground_iou": both / (true + made - both)}


def overlap_counts(truth: Array, inside: Array) -> Array:
    known = truth != UNLABELLED
    plant, made = (truth > 0) & known, inside & known
    return np.array([(plant & made).sum(), plant.sum(), made.sum()], np.int64)


def targets(config: Config, truth: Array) -> Array:
    """What is to be found: in the semantic task all foreground is one instance."""
    if config.model.task == "semantic":
        return np.where(truth == UNLABELLED, UNLABELLED, (truth > 0).astype(truth.dtype))
    return truth


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    pictures, counts = [], np.zeros(3, np.int64)
    for i in range(len(examples)):
        truth = np.asarray(examples.targets[i])
        made = grouping.instances(np.asarray(outputs["maps"][i]), config.model)
        pictures.append(compare(targets(config, truth), made.labels, made.scores))
        counts += overlap_counts(truth, made.labels > 0)
    return {**scored(pictures), **foreground(counts)}


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """One a crop where the data set names several."""
    crop = examples.columns["crop"]
    names = [str(c) for c in np.unique(crop) if c][:MAX_GROUPS]
    return {f"crop/{name}": crop == name for name in names} if len(names) > 1 else {}
