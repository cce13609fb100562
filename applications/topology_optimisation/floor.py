"""The floor for networks: the design of the most similar known problem, filled to the wanted volume. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation import pipeline
from fl_core.learning.examples import Examples

Field = npt.NDArray[Any]
FAR = 30.0  # shift of log odds beyond which a cell is void or solid to the last bit


def nearest_design(config: Any, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Field]]:
    """The application's floor: row -> outputs on ``test``. Nothing is drawn, so that ``seed`` changes nothing."""
    return {"nearest known design": {"density": nearest_designs(train, test).astype(np.float32)}}


def nearest_designs(known: Examples, wanted: Examples) -> Field:
    """(N, elements...) of ``wanted``: by the distance of load, supports and response of the solid box."""
    a, b = _features(known), _features(wanted)
    designs = pipeline.target_density(known.targets)
    found = []
    for i, features in enumerate(b):
        best = int(np.argmin(((a - features) ** 2).sum(axis=1)))
        found.append(filled(designs[best], float(wanted.inputs["volume_fraction"][i])))
    return np.stack(found)


def filled(density: Field, fraction: float) -> Field:
    """The same design with its log odds shifted until its mean is ``fraction``."""
    safe = np.clip(density.astype(np.float64), 1e-4, 1 - 1e-4)
    odds = np.log(safe / (1 - safe))
    low, high = -FAR, FAR
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-odds - middle))).mean() > fraction:
            high = middle
        else:
            low = middle
    result: Field = 1 / (1 + np.exp(-odds - low))
    return result


def _features(examples: Examples) -> Field:
    """Every kind of input with equal weight."""
    parts = [
        np.asarray(examples.inputs[name], np.float64).reshape(len(examples), -1)
        for name in ("force", "fixed", "volume_fraction", "response")
        if name in examples.inputs
    ]
    return np.concatenate([p / max(1.0, np.sqrt(p.shape[1])) for p in parts], axis=1)
