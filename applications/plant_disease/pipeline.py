"""Pre- and post-processing, torch-free: what the model takes and gives, and what users read of it.

The pixels' scaling is inside the model's graph, so that every caller feeds it plain RGB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_disease.config import Config
from fl_core.learning.application import Outputs, TensorSpec


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    side = config.data.image_size
    return (TensorSpec(name="image", dtype="uint8", shape=(-1, side, side, 3)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="logits", dtype="float32", shape=(-1, len(config.data.classes))),)


def labels(config: Config) -> tuple[str, ...]:
    return config.data.classes


def postprocess(config: Config, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """prediction: the most likely class; score_CLASS: its probability."""
    logits = np.asarray(outputs["logits"], np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf)) if len(logits) else logits
    score = odds / odds.sum(axis=1, keepdims=True)
    best = np.array(config.data.classes)[score.argmax(axis=1)] if len(score) else np.zeros(0, np.str_)
    return {"prediction": best, **{f"score_{name}": score[:, i] for i, name in enumerate(config.data.classes)}}
