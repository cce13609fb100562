"""Scores of classifiers in numpy, with scikit-learn's names and definitions; held to scikit-learn by a test.

A score that is undefined (ranking with one class only, anything of nothing) is None; ``defined`` leaves it out,
so that no NaN reaches a JSON report.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.ArrayLike
FloatArray = npt.NDArray[np.float64]


def defined(**scores: float | None) -> dict[str, float]:
    """Only the scores that exist."""
    return {name: value for name, value in scores.items() if value is not None}


def _ranked(truth: Labels, score: npt.ArrayLike) -> tuple[FloatArray, FloatArray] | None:
    """(true positives, false positives) at each distinct threshold, from the highest score down; None with one class.

    truth: (N,), non-zero = positive; score: (N,) finite.
    """
    y = np.asarray(truth).astype(bool)
    s = np.asarray(score, np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels {y.shape} and scores {s.shape} must be equally long vectors")
    if not np.isfinite(s).all():
        raise ValueError("scores must be finite")
    if y.all() or not y.any():
        return None
    order = np.argsort(-s, kind="stable")
    y, s = y[order], s[order]
    last_of_tie = np.flatnonzero(np.append(np.diff(s) != 0, True))
    tp = np.cumsum(y)[last_of_tie].astype(np.float64)
    return tp, last_of_tie + 1 - tp


def roc_auc(truth: Labels, score: npt.ArrayLike) -> float | None:
    """Area under the ROC curve; tied scores count one half."""
    ranked = _ranked(truth, score)
    if ranked is None:
        return None
    tp, fp = (np.concatenate(([0.0], counts)) for counts in ranked)
    area = float(np.sum(np.diff(fp) * (tp[1:] + tp[:-1])) / 2)
    return area / float(tp[-1] * fp[-1])


def average_precision(truth: Labels, score: npt.ArrayLike) -> float | None:
    """Sum over thresholds of (recall gained) x precision, without interpolation."""
    ranked = _ranked(truth, score)
    if ranked is None:
        return None
    tp, fp = ranked
    gained = np.diff(np.concatenate(([0.0], tp))) / tp[-1]
    return float(np.sum(gained * tp / (tp + fp)))


def accuracy(truth: Labels, prediction: Labels) -> float | None:
    """Share of equal labels."""
    y, p = np.asarray(truth), np.asarray(prediction)
    return float(np.mean(y == p)) if len(y) else None


def _ratio(part: float, whole: float) -> float:
    """0 where nothing was predicted or nothing is there, as scikit-learn's ``zero_division=0``."""
    return part / whole if whole else 0.0


def _counts(truth: Labels, prediction: Labels, label: object) -> tuple[int, int, int]:
    """(true positives, predicted, actual) of one label."""
    y, p = np.asarray(truth) == label, np.asarray(prediction) == label
    return int(np.sum(y & p)), int(np.sum(p)), int(np.sum(y))


def precision(truth: Labels, prediction: Labels, label: object = 1) -> float | None:
    tp, predicted, _ = _counts(truth, prediction, label)
    return _ratio(tp, predicted) if len(np.asarray(truth)) else None


def recall(truth: Labels, prediction: Labels, label: object = 1) -> float | None:
    tp, _, actual = _counts(truth, prediction, label)
    return _ratio(tp, actual) if len(np.asarray(truth)) else None


def f1(truth: Labels, prediction: Labels, label: object = 1) -> float | None:
    """Harmonic mean of precision and recall of ``label``."""
    tp, predicted, actual = _counts(truth, prediction, label)
    return _ratio(2 * tp, predicted + actual) if len(np.asarray(truth)) else None


def balanced_accuracy(truth: Labels, prediction: Labels) -> float | None:
    """Plain mean of the recall of every label that occurs in the truth."""
    values = [recall(truth, prediction, label) for label in np.unique(np.asarray(truth)).tolist()]
    return float(np.mean([v for v in values if v is not None])) if values else None


def f1_macro(truth: Labels, prediction: Labels) -> float | None:
    """Plain mean of the F1 of every label that occurs, in the truth or in the prediction."""
    labels = np.union1d(np.asarray(truth), np.asarray(prediction))
    values = [f1(truth, prediction, label) for label in labels.tolist()]
    return float(np.mean([v for v in values if v is not None])) if values else None
