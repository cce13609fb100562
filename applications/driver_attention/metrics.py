"""Scores of the conflict and of the driver's state, with scikit-learn's names, over the clips whose truth is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from applications.driver_attention.config import VIEWS, Config
from applications.driver_attention.pipeline import CONFLICT, STATE
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.runtime import scores


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """roc_auc, average_precision: of the conflict; state_f1_macro, state_accuracy: of the driver's state."""
    truth = np.asarray(examples.targets, np.float64).reshape(len(examples), 2)
    known = ~np.isnan(truth)
    conflict, judged = known[:, CONFLICT], known[:, STATE]
    score = np.asarray(outputs["conflict"], np.float64)[conflict]
    happened = truth[conflict, CONFLICT]
    state = truth[judged, STATE].astype(np.int64)
    guess = np.asarray(outputs["state"])[judged].argmax(axis=1) if judged.any() else state
    return scores.defined(
        roc_auc=scores.roc_auc(happened, score),
        average_precision=scores.average_precision(happened, score),
        state_f1_macro=scores.f1_macro(state, guess),
        state_accuracy=scores.accuracy(state, guess),
    )


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """all_views: every camera gave frames; without_VIEW: that one gave none."""
    there = np.asarray(examples.inputs["present"]).max(axis=2, initial=0) > 0
    found = {"all_views": np.asarray(there.all(axis=1))}
    return found | {f"without_{view}": np.asarray(~there[:, i]) for i, view in enumerate(VIEWS)}
