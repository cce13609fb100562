"""The classical floor: boosted trees over statistics of the window's channels. Needs scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_conflict import pipeline
from applications.driver_conflict.config import Config
from applications.driver_conflict.pipeline import FIRST_INCIDENT, INCIDENTS, index
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
TREES = 150


def statistics(window: Array) -> Array:
    """(N, T, C) with NaN -> (N, F): of each channel and of closing speed over range, in the judged 3 s, against the time before."""
    x = np.asarray(window, np.float64)
    derived = [-x[:, :, index(rate)] / (x[:, :, index(distance)] + 3.0) for distance, rate in pipeline.RADARS]
    speed = np.where(np.isnan(x[:, :, index("speed_vehicle_mph")]), x[:, :, index("speed_gps_mph")], x[:, :, index("speed_vehicle_mph")])  # fmt: skip
    x = np.concatenate([x, np.stack([*derived, speed], axis=2)], axis=2)
    judged, before = x[:, -pipeline.WINDOW_ROWS :], x[:, : -pipeline.WINDOW_ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN there is no mean
        change = np.nanmax(np.abs(np.diff(judged, axis=1)), axis=1)
        mean = np.nanmean(judged, axis=1)
        parts = [mean, np.nanstd(judged, axis=1), np.nanmin(judged, axis=1), np.nanmax(judged, axis=1), judged[:, -1]]
        parts += [change, mean - np.nanmean(before, axis=1)]
    return np.concatenate(parts, axis=1)


def boosted_trees(config: Config, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Array]]:
    """Row -> outputs on ``test``, as a model would give them."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    def trees() -> Any:
        return HistGradientBoostingClassifier(
            max_iter=TREES, learning_rate=0.07, max_leaf_nodes=15, l2_regularization=1.0, random_state=seed
        )

    rows = train.columns["trainable"].astype(bool) & train.columns["scored"].astype(bool)
    x, wanted = statistics(train.inputs["window"][rows]), statistics(test.inputs["window"])
    truth = train.targets[rows]
    logit = np.zeros(len(test), np.float32)
    incident = np.zeros((len(test), len(INCIDENTS)), np.float32)
    if len(np.unique(truth > 0)) == 2:
        odds = np.log(np.maximum(trees().fit(x, truth > 0).predict_proba(wanted), 1e-9))
        logit = (odds[:, 1] - odds[:, 0]).astype(np.float32)
    known = truth >= FIRST_INCIDENT
    if len(np.unique(truth[known])) >= 2:
        kinds = trees().fit(x[known], truth[known] - FIRST_INCIDENT)
        incident[:] = -20.0
        incident[:, kinds.classes_] = np.log(np.maximum(kinds.predict_proba(wanted), 1e-9))
    return {"window statistics, boosted trees": {"logit": logit, "incident": incident}}
