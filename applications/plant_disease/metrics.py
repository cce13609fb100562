"""Scores of the classifier, with scikit-learn's names, by domain and by site."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from applications.plant_disease.config import Config
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.runtime import scores

MAX_GROUPS = 64  # a report of more parts than this is no longer read


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """Of no example there is nothing to say: all are left out. balanced_accuracy: the mean recall of the classes that occur."""
    truth = examples.targets
    prediction = np.asarray(outputs["logits"]).argmax(axis=1) if len(truth) else truth
    return scores.defined(
        accuracy=scores.accuracy(truth, prediction),
        f1_macro=scores.f1_macro(truth, prediction),
        balanced_accuracy=scores.balanced_accuracy(truth, prediction),
    )


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """One a domain (such as ``lab`` and ``field``) and one a site (``site/NAME``), where the data set names them."""
    domain, site = examples.columns["domain"], examples.columns["site"]
    found = {str(d): domain == d for d in np.unique(domain) if d}
    found |= {f"site/{s}": site == s for s in np.unique(site) if s}
    return dict(list(found.items())[:MAX_GROUPS])
