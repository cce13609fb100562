"""The classical floor: colour statistics of an image, and the distance to its nearest neighbours among healthy ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly.config import Config
from applications.plant_anomaly.pipeline import latent_size
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
NEIGHBOURS = 5
NEAR = 2  # half width of the neighbourhood of a pixel's colours


def colour_statistics(image: Array) -> Array:
    """(S, S, 3) -> (F,): means, deviations and quantiles of the channels, their ratios and the excess green."""
    rgb = image.reshape(-1, 3).astype(np.float64) + 1
    part = rgb / rgb.sum(1, keepdims=True)
    channels = np.column_stack([rgb / 256, part, 2 * part[:, 1] - part[:, 0] - part[:, 2]])
    quantiles = np.quantile(channels, (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99), axis=0)
    return np.concatenate([channels.mean(0), channels.std(0), quantiles.ravel()])


def colour_neighbours(config: Config, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Array]]:
    """Floor -> outputs on ``test``, as a model would give them. The heat: how far from healthy pixels' colours (Mahalanobis)."""
    healthy = train.take(train.columns["trainable"].astype(bool))
    known = np.stack([colour_statistics(image) for image in healthy.inputs["image"]])
    mean, spread = known.mean(0), known.std(0) + 1e-9
    known = (known - mean) / spread
    asked = (np.stack([colour_statistics(image) for image in test.inputs["image"]]) - mean) / spread
    away = (np.sqrt(((known - one) ** 2).mean(1)) for one in asked)  # one at a time: all at once take gigabytes
    score = np.array([np.sort(distances)[:NEIGHBOURS].mean() for distances in away])
    pixels = healthy.inputs["image"][:, ::4, ::4].reshape(-1, 3).astype(np.float64)
    centre, precision = pixels.mean(0), np.linalg.inv(np.cov(pixels.T) + np.eye(3))
    off = test.inputs["image"].astype(np.float64) - centre
    heat = np.einsum("nyxi,ij,nyxj->nyx", off, precision, off)[:, None].astype(np.float32)
    latent = np.repeat(score[:, None], latent_size(config), 1).astype(np.float32)
    reconstruction = np.zeros((len(test), 3, *test.targets.shape[1:3]), np.float32)
    return {"colour statistics, nearest neighbours": {"reconstruction": reconstruction, "heat": heat, "latent": latent}}
