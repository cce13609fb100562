"""Scores of windows and of events, with scikit-learn's names where it has them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from applications.driver_conflict.config import Config
from applications.driver_conflict.pipeline import FIRST_INCIDENT, HOP_ROWS, RATE_HZ, postprocess
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.runtime import scores

Array = npt.NDArray[np.float64]
RECALL = 0.9  # of the conflicts, where false alarms are counted


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """Of the windows on the protocol's grid; what is undefined (one class only, no example) is left out.

    roc_auc, average_precision, accuracy, f1: of windows. event_roc_auc: of the largest score in each event's conflict and in
    its quiet part. false_alarms_per_hour: of quiet driving, at the threshold that finds 90 % of the conflicts; windows that
    follow each other are one alarm. incident_f1_macro, incident_accuracy: of the kind of each event, from the mean over the
    windows of its coded conflict, weighted by their scores: a window that shows little of a conflict says little of its kind.
    """
    mine = examples.columns["scored"].astype(bool)
    truth = np.asarray(examples.targets)[mine]
    conflict = truth > 0
    score = postprocess(config, outputs)["score"][mine]
    event, start = (np.asarray(examples.columns[name])[mine] for name in ("event_id", "start_row"))
    kinds = incidents(truth, np.asarray(outputs["incident"], np.float64)[mine], score, event)
    decided = score >= 0.5
    return scores.defined(
        roc_auc=scores.roc_auc(conflict, score),
        average_precision=scores.average_precision(conflict, score),
        accuracy=scores.accuracy(conflict, decided),
        f1=scores.f1(conflict, decided),
        event_roc_auc=event_roc_auc(conflict, score, event),
        false_alarms_per_hour=false_alarms_per_hour(conflict, score, event, start),
        incident_f1_macro=scores.f1_macro(*kinds),
        incident_accuracy=scores.accuracy(*kinds),
    )


def largest(score: Array, event: npt.NDArray[np.int64]) -> Array:
    """Of each event, in the order of their numbers."""
    if not len(score):
        return np.zeros(0)
    order = np.argsort(event, kind="stable")
    first = np.flatnonzero(np.diff(event[order], prepend=event[order][0] - 1))
    found: Array = np.maximum.reduceat(score[order], first)
    return found


def event_roc_auc(conflict: npt.NDArray[np.bool_], score: Array, event: npt.NDArray[np.int64]) -> float | None:
    happened, quiet = largest(score[conflict], event[conflict]), largest(score[~conflict], event[~conflict])
    return scores.roc_auc(np.repeat([1, 0], [len(happened), len(quiet)]), np.concatenate([happened, quiet]))


def false_alarms_per_hour(
    conflict: npt.NDArray[np.bool_], score: Array, event: npt.NDArray[np.int64], start: npt.NDArray[np.int64]
) -> float | None:
    """None where there is no conflict or no quiet window."""
    happened = np.sort(largest(score[conflict], event[conflict]))[::-1]
    if not len(happened) or conflict.all():
        return None
    threshold = happened[math.ceil(RECALL * len(happened)) - 1]
    quiet, e, s = score[~conflict], event[~conflict], start[~conflict]
    order = np.lexsort((s, e))
    alarm, e, s = quiet[order] >= threshold, e[order], s[order]
    goes_on = (np.diff(e, prepend=e[0] - 1) == 0) & (np.diff(s, prepend=s[0]) == HOP_ROWS)
    begins = alarm & ~(goes_on & np.roll(alarm, 1))
    return float(begins.sum() / (len(quiet) * HOP_ROWS / RATE_HZ / 3600))


def incidents(
    truth: npt.NDArray[np.int64], logits: Array, score: Array, event: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(true kind, predicted kind) of each event whose kind is known."""
    known = truth >= FIRST_INCIDENT
    if not known.any():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    truth, logits = truth[known], logits[known]
    chance = np.exp(logits - logits.max(axis=1, keepdims=True))
    chance *= (score[known] / chance.sum(axis=1))[:, None]
    _, first, place = np.unique(event[known], return_index=True, return_inverse=True)
    sums = np.zeros((len(first), logits.shape[1]))
    np.add.at(sums, place, chance)
    return truth[first] - FIRST_INCIDENT, sums.argmax(axis=1).astype(np.int64)


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """full_context: windows whose 8 s lie wholly inside the record; history_10s: that end 10 s or more after its start."""
    full = examples.columns["full_context"].astype(bool)
    return {"full_context": full, "history_10s": np.asarray(examples.columns["end_row"] >= 10 * RATE_HZ)}
