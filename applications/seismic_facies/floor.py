"""Classical floors to read a model's scores by: seismic attributes with boosted trees, and depth alone. Needs scikit-learn.

The attributes are those that interpreters compute (Chopra and Marfurt, Geophysics 70, 2005): envelope, instantaneous
frequency, roughness, dip and coherence from the gradient structure tensor, averaged over small and large neighbourhoods.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.config import Config
from applications.seismic_facies.pipeline import UNLABELLED
from fl_core.learning import seeding
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
TRAINING_VOXELS, TRAINING_VOLUMES = 60_000, 64  # sub-volumes whose attributes are computed
TREES = 120
SMALL, LARGE = 2, 5  # half widths of the neighbourhoods, in samples


def box_mean(volume: Array, half: int) -> Array:
    """Mean over (2 half + 1)^3 voxels, the volume mirrored at its faces; by running sums."""
    made = volume
    for axis in range(3):
        width = [(0, 0)] * 3
        width[axis] = (half + 1, half)
        sums = np.cumsum(np.pad(made, width, mode="symmetric"), axis=axis, dtype=np.float64)
        high = np.take(sums, np.arange(2 * half + 1, sums.shape[axis]), axis)
        low = np.take(sums, np.arange(sums.shape[axis] - 2 * half - 1), axis)
        made = (high - low) / (2 * half + 1)
    return made.astype(np.float32)


def analytic(volume: Array) -> Array:
    """The complex trace (Taner, Koehler and Sheriff 1979), over time."""
    n = volume.shape[-1]
    gain = np.zeros(n)
    gain[0], gain[1 : (n + 1) // 2] = 1, 2
    if n % 2 == 0:
        gain[n // 2] = 1
    made: Array = np.fft.ifft(np.fft.fft(volume, axis=-1) * gain, axis=-1)
    return made


def attributes(amplitude: Array) -> Array:
    """(inline, crossline, sample) -> (voxels, attributes) float32."""
    trace = analytic(amplitude)
    envelope = np.abs(trace).astype(np.float32)
    turn = trace[..., 1:] * np.conj(trace[..., :-1])
    frequency = np.pad(np.angle(turn), ((0, 0), (0, 0), (0, 1)), mode="edge").astype(np.float32)
    gradient = np.gradient(amplitude)
    found = [amplitude, envelope, frequency]
    for half in (SMALL, LARGE):
        energy = box_mean(amplitude**2, half)
        found += [np.sqrt(energy), box_mean(envelope, half), box_mean(frequency, half)]
        found.append(np.sqrt(np.maximum(box_mean(envelope**2, half) - box_mean(envelope, half) ** 2, 0)))
        tensor = {(a, b): box_mean(gradient[a] * gradient[b], half) for a in range(3) for b in range(a, 3)}
        whole = tensor[0, 0] + tensor[1, 1] + tensor[2, 2] + 1e-6
        found += [tensor[a, a] / whole for a in range(3)]
        dips = [tensor[a, 2] / (tensor[2, 2] + 1e-6) for a in (0, 1)]
        found += [*dips, np.hypot(*dips)]
        found.append(tensor[2, 2] / (energy + 1e-6))
        matrix = np.stack([np.stack([tensor[min(a, b), max(a, b)] for b in range(3)], -1) for a in range(3)], -2)
        values = np.linalg.eigvalsh(matrix.astype(np.float32))
        found.append((values[..., 2] - values[..., 1]) / (values[..., 2] + 1e-6))
    for axis in (0, 1):  # semblance with the neighbouring traces
        around = (np.roll(amplitude, 1, axis) + amplitude + np.roll(amplitude, -1, axis)) / 3
        found.append(box_mean(around**2, SMALL) / (box_mean(amplitude**2, SMALL) + 1e-6))
    return np.stack([f.astype(np.float32) for f in found], -1).reshape(-1, len(found))


def depth(examples: Examples, i: int) -> Array:
    """(voxels, 1): the sample number in its volume."""
    shape = examples.targets[i].shape
    first = int(examples.columns["sample"][i])
    return np.broadcast_to(first + np.arange(shape[2], dtype=np.float32), shape).reshape(-1, 1)


def boosted_trees(config: Config, train: Examples, test: Examples, *, seed: int) -> dict[str, dict[str, Array]]:
    """Floor -> outputs on ``test``, as a model would give them."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    floors = {
        "attributes with boosted trees": lambda e, i: attributes(e.inputs["amplitude"][i][0]),
        "depth alone": depth,
    }
    rng = seeding.generator(seed, "seismic floor")
    made = {}
    for name, features in floors.items():
        chosen = np.sort(rng.permutation(len(train))[:TRAINING_VOLUMES]).tolist()
        each = max(1, TRAINING_VOXELS // max(1, len(chosen)))
        xs, ys = [], []
        for i in chosen:
            y = np.asarray(train.targets[i]).ravel()
            pick = rng.permutation(np.flatnonzero(y != UNLABELLED))[:each]
            if len(pick):
                xs.append(features(train, i)[pick])
                ys.append(y[pick])
        trees = HistGradientBoostingClassifier(max_iter=TREES, learning_rate=0.15, max_leaf_nodes=31, random_state=seed)
        trees.fit(np.concatenate(xs), np.concatenate(ys))
        made[name] = {"logits": np.stack([_logits(trees, features(test, i), config, test.targets[i].shape) for i in range(len(test))])}  # fmt: skip
    return made


def _logits(trees: Any, features: Array, config: Config, shape: tuple[int, ...]) -> Array:
    logits = np.full((len(config.data.classes), features.shape[0]), -30.0, np.float32)
    logits[trees.classes_] = np.log(np.maximum(trees.predict_proba(features), 1e-12)).T
    return logits.reshape(-1, *shape)
