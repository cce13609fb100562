"""Views, kinematics, pre- and post-processing, torch-free.

The model takes grey frames as the cameras gave them (uint8), a mask of the frames that are there, and physical values of
motion with NaN where a sample is missing. Scaling is inside the model's graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_attention.config import VIEWS, Config
from fl_core.learning.application import Outputs, TensorSpec

STATES = ("attentive", "distracted", "drowsy")
CONFLICT, STATE = 0, 1  # columns of the targets; NaN = not known
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Channel:
    """A channel of motion; a value outside [low, high] counts as missing. scale: the model divides by it."""

    name: str
    low: float
    high: float
    scale: float


CHANNELS = (
    Channel("speed_mps", 0.0, 80.0, 15.0),
    Channel("long_acc_mps2", -15.0, 15.0, 3.0),
    Channel("lat_acc_mps2", -15.0, 15.0, 2.0),
    Channel("yaw_rate_dps", -90.0, 90.0, 8.0),
    Channel("brake", 0.0, 1.0, 1.0),
    Channel("turn_signal", -1.0, 1.0, 1.0),  # 1 = left, -1 = right
)
NAMES = tuple(c.name for c in CHANNELS)


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    d = config.data
    views = len(VIEWS)
    return (
        TensorSpec(name="frames", dtype="uint8", shape=(-1, views, d.frames, d.height, d.width)),
        TensorSpec(name="present", dtype="float32", shape=(-1, views, d.frames)),
        TensorSpec(name="kinematics", dtype="float32", shape=(-1, d.frames, len(CHANNELS))),
    )


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="conflict", dtype="float32", shape=(-1,)),
        TensorSpec(name="state", dtype="float32", shape=(-1, len(STATES))),
    )


def labels(config: Config) -> tuple[str, ...]:
    return ("no_conflict", "conflict")


def sampling_times(config: Config, end: float) -> npt.NDArray[np.float64]:
    """Seconds of a clip's frames; the last one is at ``end``."""
    return end - np.arange(config.data.frames - 1, -1, -1) / config.data.rate_hz


def nearest(wanted: npt.NDArray[np.float64], have: npt.NDArray[np.float64], within: float) -> npt.NDArray[np.int64]:
    """For each wanted time the index of the nearest of ``have`` (ascending), -1 where none is within ``within`` seconds."""
    if not len(have):
        return np.full(len(wanted), -1, np.int64)
    after = np.clip(np.searchsorted(have, wanted), 1, len(have) - 1) if len(have) > 1 else np.zeros(len(wanted), int)
    before = np.maximum(after - 1, 0)
    best = np.where(np.abs(have[before] - wanted) <= np.abs(have[after] - wanted), before, after)
    found: npt.NDArray[np.int64] = np.where(np.abs(have[best] - wanted) <= within, best, -1)
    return found


def clean(kinematics: Array) -> npt.NDArray[np.float32]:
    """(..., C) readings -> the same with NaN for whatever is not a measurement."""
    x = kinematics.astype(np.float32)
    low = np.array([c.low for c in CHANNELS], np.float32)
    high = np.array([c.high for c in CHANNELS], np.float32)
    with np.errstate(invalid="ignore"):
        x[~((x >= low) & (x <= high))] = np.nan
    return x


def postprocess(config: Config, outputs: Outputs) -> dict[str, Array]:
    """score: the probability of a conflict; state: the driver's most likely state; score_STATE: its probability."""
    logit = np.clip(np.asarray(outputs["conflict"], np.float64), -50.0, 50.0)
    logits = np.asarray(outputs["state"], np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf)) if len(logits) else logits
    share = odds / odds.sum(axis=1, keepdims=True)
    best = np.array(STATES)[share.argmax(axis=1)] if len(share) else np.zeros(0, np.str_)
    return {
        "score": 1.0 / (1.0 + np.exp(-logit)),
        "state": best,
        **{f"score_{name}": share[:, i] for i, name in enumerate(STATES)},
    }
