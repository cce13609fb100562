"""Channels, windows, pre- and post-processing, torch-free.

The model takes raw physical values: 8 s of rows that end with the window, NaN where a sample is missing. Scaling,
masks and derived channels are inside the model's graph, so that every caller feeds it sensor readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_conflict.config import Config
from fl_core.learning.application import Outputs, TensorSpec

RATE_HZ = 10
WINDOW_ROWS = 30  # 3 s: the window that is judged
HOP_ROWS = 15
CONTEXT_ROWS = 80  # 8 s, ending with the window: all that a score may depend on
GAP_ROWS = 50  # a negative window ends more than this before the conflict
# Targets: 0 no conflict, 1 a conflict of unknown kind, 2 and more: these kinds.
INCIDENTS = ("rear_end_striking", "rear_end_struck", "sideswipe", "road_departure", "other")
INCIDENT_SHARES = (0.46, 0.11, 0.15, 0.08, 0.20)  # of the events of 67 vehicles of the 100-Car study
LABELS = ("no_conflict", "conflict", *INCIDENTS)
FIRST_INCIDENT = 2
CODED = {  # as the 100-Car study codes the commonest; whatever else is coded is "other"
    "rear-end striking": "rear_end_striking",
    "rear-end struck": "rear_end_struck",
    "sideswipe same direction": "sideswipe",
    "road departure (left or right)": "road_departure",
}
SENSORS = {  # channels that fail together, because one sensor gives them
    "speed": ("speed_vehicle_mph",),
    "gps": ("speed_gps_mph",),
    "yaw": ("yaw_rate_dps",),
    "acceleration": ("lat_acc_g", "long_acc_g"),
    "front_radar": ("fwd_range_ft", "fwd_range_rate_ftps"),
    "rear_radar": ("rear_range_ft", "rear_range_rate_ftps"),
    "brake": ("brake",),
    "turn_signal": ("turn_signal",),
}

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Channel:
    """A sensor channel; a reading outside [low, high] is a sensor fault or no target, that is: missing."""

    name: str
    low: float
    high: float
    scale: float  # the model divides by it


# Bounds: -1 marks a missing speed, GPS above 200 is invalid, radar 0 is no target; yaw rates beyond 60 deg/s and
# accelerations beyond 2 g are gyroscope and accelerometer faults. Scales: about the channel's ordinary range.
CHANNELS = (
    Channel("speed_vehicle_mph", 0.0, 130.0, 40.0),
    Channel("speed_gps_mph", 0.0, 130.0, 40.0),
    Channel("yaw_rate_dps", -60.0, 60.0, 10.0),
    Channel("lat_acc_g", -2.0, 2.0, 0.25),
    Channel("long_acc_g", -2.0, 2.0, 0.25),
    Channel("fwd_range_ft", 0.1, 1000.0, 100.0),
    Channel("fwd_range_rate_ftps", -150.0, 150.0, 20.0),
    Channel("rear_range_ft", 0.1, 1000.0, 100.0),
    Channel("rear_range_rate_ftps", -150.0, 150.0, 20.0),
    Channel("brake", 0.0, 1.0, 1.0),
    Channel("turn_signal", 0.0, 3.0, 1.0),
)
NAMES = tuple(c.name for c in CHANNELS)
ACCELERATIONS = SENSORS["acceleration"]
RADARS = (SENSORS["front_radar"], SENSORS["rear_radar"])


def index(name: str) -> int:
    return NAMES.index(name)


def clean(rows: npt.NDArray[Any]) -> FloatArray:
    """(rows, C) readings -> the same with NaN for whatever is not a measurement. C are ``CHANNELS``."""
    x = rows.astype(np.float32)
    low = np.array([c.low for c in CHANNELS], np.float32)
    high = np.array([c.high for c in CHANNELS], np.float32)
    with np.errstate(invalid="ignore"):
        x[~((x >= low) & (x <= high))] = np.nan
    for distance, rate in RADARS:
        x[np.isnan(x[:, index(distance)]), index(rate)] = np.nan
    return x


def contexts(rows: FloatArray, ends: npt.NDArray[np.int64]) -> FloatArray:
    """(N, CONTEXT_ROWS, C): the rows [end - CONTEXT_ROWS, end) for each end; NaN before the record's first row."""
    padded = np.concatenate([np.full((CONTEXT_ROWS, rows.shape[1]), np.nan, np.float32), rows])
    if len(ends) and not (ends.min() >= 0 and ends.max() <= len(rows)):
        raise ValueError(f"window ends must lie in 0..{len(rows)}")
    result: FloatArray = padded[ends[:, None] + np.arange(CONTEXT_ROWS)]
    return result


def window_starts(rows: int, hop: int = HOP_ROWS) -> npt.NDArray[np.int64]:
    """First rows of the whole 3 s windows in a record of ``rows`` rows: every HOP_ROWS, and every ``hop`` between."""
    starts = np.arange(0, max(0, rows - WINDOW_ROWS + 1), dtype=np.int64)
    found: npt.NDArray[np.int64] = starts[(starts % HOP_ROWS) % hop == 0]
    return found


def window_labels(starts: npt.NDArray[np.int64], first: int, last: int) -> npt.NDArray[np.int64]:
    """1: overlaps the conflict's rows first..last (both counted); 0: ends more than 5 s before; -1: unused."""
    ends = starts + WINDOW_ROWS
    conflict = (starts <= last) & (ends > first)
    return np.where(conflict, 1, np.where(ends + GAP_ROWS < first, 0, -1))


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="window", dtype="float32", shape=(-1, CONTEXT_ROWS, len(CHANNELS))),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="logit", dtype="float32", shape=(-1,)),
        TensorSpec(name="incident", dtype="float32", shape=(-1, len(INCIDENTS))),
    )


def labels(config: Config) -> tuple[str, ...]:
    return LABELS


def incident_label(coded: str) -> int:
    """The target of a conflict whose incident type is coded so; empty: unknown."""
    if not coded:
        return LABELS.index("conflict")
    return LABELS.index(CODED.get(coded, coded if coded in INCIDENTS else "other"))


def postprocess(config: Config, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """score: the probability of a conflict; incident: its likeliest kind, should there be one."""
    logit = np.clip(np.asarray(outputs["logit"], np.float64), -50.0, 50.0)
    kind = np.asarray(outputs["incident"])
    best = np.array(INCIDENTS)[kind.argmax(axis=1)] if len(kind) else np.zeros(0, np.str_)
    return {"score": 1.0 / (1.0 + np.exp(-logit)), "incident": best}
