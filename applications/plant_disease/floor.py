"""The classical floor to read a model's scores by: histograms of colour, gradient and local binary patterns in a random forest.

Dalal and Triggs (CVPR 2005) for gradients, Ojala et al. (PAMI 24, 2002) for the patterns. Needs scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_disease.config import Config
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
TREES = 300
AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def share(values: Array, bins: int, low: float, high: float, weights: Array | None = None) -> Array:
    count, _ = np.histogram(values, bins, (low, high), weights=weights)
    made: Array = count / max(float(count.sum()), 1e-9)
    return made


def histograms(image: Array) -> Array:
    """(S, S, 3) uint8 -> (F,)"""
    rgb = image.astype(np.float32)
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    part = rgb / (rgb.sum(-1, keepdims=True) + 1)
    found = [share(rgb[..., c], 16, 0, 256) for c in range(3)] + [share(part[..., c], 16, 0, 0.8) for c in range(3)]
    joint = (image // 64).astype(np.int64) @ np.array([16, 4, 1])
    found.append(np.bincount(joint.ravel(), minlength=64) / joint.size)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    found += [share(np.arctan2(down, right), 16, -np.pi, np.pi, strength), share(np.log1p(strength), 16, 0, 5)]
    middle = grey[1:-1, 1:-1]
    side = len(grey)
    pattern = np.zeros(middle.shape, np.int64)
    for bit, (y, x) in enumerate(AROUND):
        pattern |= (grey[1 + y : side - 1 + y, 1 + x : side - 1 + x] > middle).astype(np.int64) << bit
    found.append(np.bincount(pattern.ravel(), minlength=256) / pattern.size)
    return np.concatenate(found)


def random_forest(config: Config, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Array]]:
    """Floor -> outputs on ``test``, as a model would give them."""
    from sklearn.ensemble import RandomForestClassifier

    features = [np.stack([histograms(image) for image in e.inputs["image"]]) for e in (train, test)]
    forest = RandomForestClassifier(TREES, random_state=seed, class_weight="balanced_subsample")
    forest.fit(features[0], train.targets)
    logits = np.full((len(test), len(config.data.classes)), -30.0, np.float32)
    logits[:, forest.classes_] = np.log(np.maximum(forest.predict_proba(features[1]), 1e-9))
    return {"histograms in a random forest": {"logits": logits}}
