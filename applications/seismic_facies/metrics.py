"""Scores of a segmentation, and how often its labels change from slice to slice where the truth does not.

Intersection over union, pixel and mean class accuracy as in Long et al. (CVPR 2015) and Alaudah et al. (Geophysics 2019).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.config import Config
from applications.seismic_facies.pipeline import UNLABELLED
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples

Labels = npt.NDArray[np.integer]
MAX_GROUPS = 64


def confusion(truth: Labels, prediction: Labels, classes: int) -> npt.NDArray[np.int64]:
    """(classes, classes): voxels by true (row) and predicted class; voxels without a label are left out."""
    known = truth != UNLABELLED
    pairs = truth[known].astype(np.int64) * classes + prediction[known].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def segmentation_scores(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Of a confusion matrix; classes that neither the truth nor the prediction holds are left out of the means."""
    total = counts.sum()
    if not total:
        return {}
    hit, actual, found = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    union = actual + found - hit
    iou = class_iou(counts)[union > 0]
    return {
        "mean_iou": float(iou.mean()),
        "pixel_accuracy": float(hit.sum() / total),
        "mean_class_accuracy": float((hit[actual > 0] / actual[actual > 0]).mean()),
        "frequency_weighted_iou": float((actual[union > 0] * iou).sum() / total),
    }


def class_iou(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(classes,): of a confusion matrix; not a number for a class that neither the truth nor the prediction holds."""
    hit = np.diag(counts)
    union = counts.sum(axis=1) + counts.sum(axis=0) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def slice_changes(truth: Labels, prediction: Labels) -> npt.NDArray[np.int64]:
    """(pairs, changes of the truth, changes of the prediction, changes of the prediction only) between neighbouring inlines.

    truth, prediction: (..., inline, crossline, depth). A pair counts where both voxels have a label.
    """
    a, b = truth[..., :-1, :, :], truth[..., 1:, :, :]
    known = (a != UNLABELLED) & (b != UNLABELLED)
    true = (a != b) & known
    made = (prediction[..., :-1, :, :] != prediction[..., 1:, :, :]) & known
    return np.array([known.sum(), true.sum(), made.sum(), (made & ~true).sum()], np.int64)


def continuity_scores(changes: npt.NDArray[np.int64]) -> dict[str, float]:
    """Per pair of neighbouring voxels across slices. excess: prediction minus truth; below 0 where a prediction is too smooth.

    false: changes where the truth has none, which no smoothness elsewhere makes up for.
    """
    pairs, true, made, false = (int(v) for v in changes)
    if not pairs:
        return {}
    return {"excess_slice_changes": (made - true) / pairs, "false_slice_changes": false / pairs}


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """Over all voxels of all sub-volumes; of no labelled voxel there is nothing to say."""
    classes = len(config.data.classes)
    counts = np.zeros((classes, classes), np.int64)
    changes = np.zeros(4, np.int64)
    for i in range(len(examples)):  # one sub-volume at a time: a data set's logits may be on disk
        truth = np.asarray(examples.targets[i])
        prediction = np.asarray(outputs["logits"][i]).argmax(axis=0)
        counts += confusion(truth, prediction, classes)
        changes += slice_changes(truth, prediction)
    return {**segmentation_scores(counts), **continuity_scores(changes)}


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """One a company where the data set names several."""
    company = examples.columns["company"]
    names = [str(c) for c in np.unique(company) if c][:MAX_GROUPS]
    return {f"company/{name}": company == name for name in names} if len(names) > 1 else {}
