"""Classical floors to read a model's scores by: boosted trees over kinematics, over each view's statistics, over all. Needs scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_attention.config import VIEWS, Config
from applications.driver_attention.pipeline import CONFLICT, STATE, STATES
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
CELLS = (4, 6)  # rows and columns of the patches whose grey is averaged
TREES = 150


def over_time(x: Array) -> Array:
    """(N, T, F) with NaN -> (N, 6 F): mean, spread, least, most, last, change over the second half."""
    half = x.shape[1] // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN there is no mean
        parts = [np.nanmean(x, 1), np.nanstd(x, 1), np.nanmin(x, 1), np.nanmax(x, 1), x[:, -1]]
        parts.append(np.nanmean(x[:, half:], 1) - np.nanmean(x[:, :half], 1))
    return np.concatenate(parts, axis=1)


def view_statistics(examples: Examples, view: int) -> Array:
    """Grey of patches, its spread in the frame, and how much changes from frame to frame; over time as ``over_time``."""
    frames = np.asarray(examples.inputs["frames"][:, view], np.float32)
    n, times, height, width = frames.shape
    missing = np.asarray(examples.inputs["present"][:, view]) == 0
    rows, columns = height // CELLS[0], width // CELLS[1]
    patches = frames[:, :, : rows * CELLS[0], : columns * CELLS[1]].reshape(n, times, CELLS[0], rows, CELLS[1], columns)
    change = np.abs(np.diff(frames, axis=1, prepend=frames[:, :1])).mean(axis=(2, 3))
    found = np.concatenate(
        [patches.mean(axis=(3, 5)).reshape(n, times, -1), frames.std(axis=(2, 3))[..., None], change[..., None]], axis=2
    )
    found[missing] = np.nan
    return over_time(found)


def features(examples: Examples) -> dict[str, Array]:
    kinematics = over_time(np.asarray(examples.inputs["kinematics"], np.float64))
    views = {f"{view} statistics": view_statistics(examples, i) for i, view in enumerate(VIEWS)}
    return {"kinematics": kinematics, **views, "all": np.concatenate([kinematics, *views.values()], axis=1)}


def boosted_trees(config: Config, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Array]]:
    """Row -> outputs on ``test``, as a model would give them."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    known, wanted = features(train), features(test)
    targets = np.asarray(train.targets)
    made = {}
    for name, x in known.items():
        outputs = {"conflict": np.zeros(len(test), np.float32), "state": np.zeros((len(test), len(STATES)), np.float32)}
        for head, column in (("conflict", CONFLICT), ("state", STATE)):
            rows = ~np.isnan(targets[:, column])
            truth = targets[rows, column].astype(int)
            if len(np.unique(truth)) < 2:
                continue
            trees = HistGradientBoostingClassifier(
                max_iter=TREES, learning_rate=0.1, max_leaf_nodes=15, random_state=seed
            )
            odds = np.log(np.maximum(trees.fit(x[rows], truth).predict_proba(wanted[name]), 1e-9))
            if head == "conflict":
                outputs[head] = (odds[:, 1] - odds[:, 0]).astype(np.float32)
            else:
                outputs[head][:] = -30.0
                outputs[head][:, trees.classes_] = odds
        made[f"{name}, boosted trees"] = outputs
    return made
