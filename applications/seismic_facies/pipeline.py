"""Pre- and post-processing, torch-free: what the model takes and gives, and what users read of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.config import Config
from fl_core.learning.application import Outputs, TensorSpec

UNLABELLED = 255


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    """amplitude: axes inline, crossline, time or depth; in units of its volume's root mean square."""
    side = config.data.crop
    return (TensorSpec(name="amplitude", dtype="float32", shape=(-1, 1, side, side, side)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    side = config.data.crop
    return (TensorSpec(name="logits", dtype="float32", shape=(-1, len(config.data.classes), side, side, side)),)


def labels(config: Config) -> tuple[str, ...]:
    return config.data.classes


def probabilities(logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Softmax over the axis 1."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    result: npt.NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def postprocess(config: Config, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """One row a sub-volume: ``score``, the mean probability of the chosen facies, and the share of each facies."""
    logits = np.asarray(outputs["logits"])
    count, classes = logits.shape[:2]
    score, shares = np.zeros(count), np.zeros((count, classes))
    for i in range(count):
        chosen = probabilities(logits[i : i + 1])
        score[i] = chosen.max(axis=1).mean()
        shares[i] = chosen.mean(axis=(0, 2, 3, 4))
    return {"score": score, **{f"share_{name}": shares[:, k] for k, name in enumerate(config.data.classes)}}
