"""Ranking and threshold scores of conflict windows, with scikit-learn's names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from applications.driver_conflict.config import Config
from applications.driver_conflict.pipeline import postprocess
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.runtime import scores


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """With one class only, or no example, the scores that are then undefined are left out."""
    truth = examples.targets
    score = postprocess(config, outputs)["score"]
    decided = score >= 0.5
    return scores.defined(
        roc_auc=scores.roc_auc(truth, score),
        average_precision=scores.average_precision(truth, score),
        accuracy=scores.accuracy(truth, decided),
        f1=scores.f1(truth, decided),
    )


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """full_context: windows whose 8 s lie wholly inside the record."""
    return {"full_context": examples.columns["full_context"].astype(bool)}
