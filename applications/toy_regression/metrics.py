"""Squared error and the coefficient of determination, with scikit-learn's names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from applications.toy_regression.config import Config
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    truth = examples.targets.astype(np.float64)
    error = float(np.mean((np.asarray(outputs["value"], np.float64) - truth) ** 2))
    variance = float(np.var(truth))
    return {"mean_squared_error": error, "r2": 1.0 - error / variance if variance > 0 else 0.0}


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    return {}
