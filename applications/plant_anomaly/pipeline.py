"""Pre- and post-processing, torch-free: what the model takes and gives, and what users read of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly.config import Config
from fl_core.learning.application import Outputs, TensorSpec

Array = npt.NDArray[Any]
EVIDENCE = 2  # of the latent vector's entries: heat and reconstruction error, which count from healthy plants' upwards
UNKNOWN = 255  # of a lesion mask: not labelled


def latent_size(config: Config) -> int:
    return EVIDENCE + config.model.latent


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    side = config.data.image_size
    return (TensorSpec(name="image", dtype="uint8", shape=(-1, side, side, 3)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    """reconstruction: what the image would be without lesions, scaled as in the model; heat: logit of a lesion at each pixel; latent:
    whitened by the healthy plants' statistics, so that its squared norm is a squared Mahalanobis distance, one-sided and weighted in
    its first two entries, the evidence, and logarithmic in the others' sum beyond ``model.latent_knee``."""
    side = config.data.image_size
    return (
        TensorSpec(name="reconstruction", dtype="float32", shape=(-1, 3, side, side)),
        TensorSpec(name="heat", dtype="float32", shape=(-1, 1, side, side)),
        TensorSpec(name="latent", dtype="float32", shape=(-1, latent_size(config))),
    )


def labels(config: Config) -> tuple[str, ...]:
    return ()


def distance(latent: Array) -> Array:
    """(N, D) whitened -> (N,): distance from healthy in units of its root mean square over healthy plants."""
    made: Array = np.sqrt(np.mean(np.asarray(latent, np.float64) ** 2, axis=1))
    return made


def heat_score(heat: Array) -> Array:
    """(N, 1, S, S) -> (N,): the logit that one pixel in 500 exceeds."""
    flat = np.asarray(heat, np.float64).reshape(len(heat), -1)
    count = max(1, flat.shape[1] // 500)
    made: Array = np.partition(flat, -count, axis=1)[:, -count] if len(flat) else np.zeros(0)
    return made


def probability(logit: Array) -> Array:
    made: Array = 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, np.float64)))
    return made


def postprocess(config: Config, outputs: Outputs) -> dict[str, Array]:
    """score: how far from healthy (about 1 for healthy plants); lesion_share: the mean of the heat map, from 0 to 1."""
    heat = np.asarray(outputs["heat"])
    return {"score": distance(outputs["latent"]), "lesion_share": probability(heat).reshape(len(heat), -1).mean(axis=1)}
