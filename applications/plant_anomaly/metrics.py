"""How well sick plants are told from healthy ones, by image and by pixel. Only healthy ones were learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly import pipeline
from applications.plant_anomaly.config import Config
from applications.plant_anomaly.pipeline import UNKNOWN
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.runtime import scores

Array = npt.NDArray[Any]
FALSE_ALARMS = 0.05
PIXELS = 1_000_000  # at most, evenly taken: sorting all of a large data set would take longer than predicting it
MAX_GROUPS = 64


def rate_at(score: Array, sick: Array, false_alarms: float) -> float | None:
    """Share of the sick above the score that ``false_alarms`` of the healthy exceed."""
    if sick.all() or not sick.any():
        return None
    return float((score[sick] > np.quantile(score[~sick], 1 - false_alarms, method="higher")).mean())


def reconstruction_error(outputs: Outputs, examples: Examples) -> Array:
    """(N,): mean absolute difference between the image and its reconstruction, in units of 64 grey levels."""
    made = np.empty(len(examples))
    for i in range(len(examples)):
        image = examples.inputs["image"][i].astype(np.float32).transpose(2, 0, 1) / 64 - 2
        made[i] = np.abs(np.asarray(outputs["reconstruction"][i]) - image).mean()
    return made


def pixel_roc_auc(outputs: Outputs, examples: Examples) -> float | None:
    """Over the pixels of all images whose lesions are known."""
    lesions = examples.targets[..., 3]
    step = max(1, lesions.size // PIXELS)
    heat = np.asarray(outputs["heat"]).reshape(len(lesions), -1).ravel()[::step]
    truth = lesions.reshape(len(lesions), -1).ravel()[::step]
    known = truth != UNKNOWN
    return scores.roc_auc(truth[known], heat[known])


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """roc_auc, average_precision and tpr_at_5_fpr are of the distance in the latent space; the others of one part each."""
    sick = examples.columns["sick"].astype(bool)
    distance = pipeline.distance(outputs["latent"])
    return scores.defined(
        roc_auc=scores.roc_auc(sick, distance),
        average_precision=scores.average_precision(sick, distance),
        tpr_at_5_fpr=rate_at(distance, sick, FALSE_ALARMS),
        roc_auc_heat=scores.roc_auc(sick, pipeline.heat_score(outputs["heat"])),
        roc_auc_reconstruction=scores.roc_auc(sick, reconstruction_error(outputs, examples)),
        pixel_roc_auc=pixel_roc_auc(outputs, examples),
    )


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    """``SITE/LABEL``: the healthy and the sick of one site with both; ``confounded/LABEL@SITE``: the sick of a site without
    healthy plants against those of all sites, where the site may tell them apart."""
    label, site, sick = (examples.columns[k] for k in ("label", "site", "sick"))
    found = {}
    if len(np.unique(site)) > 12:  # fields of a generator: by disease, over all of them
        return {f"all/{name}": ~sick | (label == name) for name in np.unique(label[sick])[:MAX_GROUPS]}
    for place in np.unique(site):
        here = site == place
        for name in np.unique(label[here & sick]):
            mine = here & (label == name)
            if (here & ~sick).any():
                found[f"{place}/{name}"] = mine | (here & ~sick)
            else:
                found[f"confounded/{name}@{place}"] = mine | ~sick
    return dict(list(found.items())[:MAX_GROUPS])
