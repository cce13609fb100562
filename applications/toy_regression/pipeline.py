"""Pre- and post-processing, torch-free. The model takes the raw columns, so there is nothing to do before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.toy_regression.config import Config
from fl_core.learning.application import Outputs, TensorSpec


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="features", dtype="float32", shape=(-1, config.data.features)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="value", dtype="float32", shape=(-1,)),)


def labels(config: Config) -> tuple[str, ...]:
    return ()


def postprocess(config: Config, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    return {"prediction": np.asarray(outputs["value"], np.float64)}
