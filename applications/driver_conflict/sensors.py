"""What a vehicle's instruments record of its motion: calibration of each vehicle, noise, faults, drop-outs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from applications.driver_conflict import pipeline
from applications.driver_conflict.simulator import Motion

ALL_CHANNELS = (  # as the 100-Car files hold them
    *("t_s", "sync", "gas_pedal", *pipeline.NAMES[:5], "lane_dist_left_in", "lane_dist_right_in"),
    *(*pipeline.NAMES[5:], "light"),
)
MPH = 1 / 0.44704
FT = 1 / 0.3048
G = 9.80665
DEGREES = 180 / np.pi
RADAR_RANGE_M = 140.0
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SensorKit:
    """One vehicle's calibration errors and faults."""

    lateral_offset: float  # g
    long_offset: float
    acceleration_gain: float
    acceleration_noise: float
    yaw_offset: float  # deg/s
    speed_gain: float
    radar_noise_m: float
    radar_dropouts: float  # drop-outs a second
    has_brake: bool
    has_speed: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        return cls(
            lateral_offset=rng.normal(0, 0.02),
            long_offset=rng.normal(0, 0.02),
            acceleration_gain=rng.normal(1, 0.04),
            acceleration_noise=rng.uniform(0.008, 0.03),
            yaw_offset=rng.normal(0, 0.4),
            speed_gain=rng.normal(1, 0.02),
            radar_noise_m=rng.uniform(0.1, 0.6),
            radar_dropouts=rng.uniform(0.02, 0.25),
            has_brake=bool(rng.random() > 0.09),
            has_speed=bool(rng.random() > 0.08),
        )


@dataclass(frozen=True)
class Reading:
    """rows: (n, len(ALL_CHANNELS)) float32, as the native format holds them."""

    rows: npt.NDArray[np.float32]
    speed_ok: bool
    accel_ok: bool


def read_out(
    kit: SensorKit, motion: Motion, drive: int, record: slice, lateral: Array, curvature: Array, signal: Array,
    rng: np.random.Generator,
) -> Reading:  # fmt: skip
    """One drive's record. lateral: steering (m/s2); curvature: of the road (1/m); both over the drive's steps."""
    speed = motion.speed[drive, record]
    acceleration = motion.acceleration[drive, record]
    rows = len(speed)
    sideways = lateral[record] * np.minimum(speed / 8.0, 1.0) + curvature[record] * speed**2
    sideways = _smooth(sideways + 0.15 * _wander(rng, rows), 4)
    yaw = sideways / np.maximum(speed, 3.0)
    noise = rng.standard_normal((rows, 4))
    gas = np.clip(12 + 18 * acceleration + 0.4 * speed + 2 * _wander(rng, rows), 0, 100) * (acceleration > -0.3)
    offset = np.cumsum(np.cumsum(sideways - sideways.mean())) * 0.01
    columns = {
        "t_s": np.arange(rows) / pipeline.RATE_HZ,
        "sync": rng.integers(1, 60_000) + np.arange(rows),
        "gas_pedal": gas,
        "speed_vehicle_mph": np.round(speed * MPH * kit.speed_gain, 1),
        "speed_gps_mph": _held(np.maximum(0, speed * MPH + 0.3 * noise[:, 0]), 10),
        "yaw_rate_dps": np.round((yaw * DEGREES + kit.yaw_offset + 0.15 * noise[:, 1]) / 0.325) * 0.325,
        "lat_acc_g": kit.acceleration_gain * sideways / G + kit.lateral_offset + kit.acceleration_noise * noise[:, 2],
        "long_acc_g": kit.acceleration_gain * acceleration / G + kit.long_offset + kit.acceleration_noise * noise[:, 3],
        "lane_dist_left_in": np.clip(-72 + 12 * offset + 3 * _wander(rng, rows), -327, 327),
        "lane_dist_right_in": np.clip(72 + 12 * offset + 3 * _wander(rng, rows), -327, 327),
        "brake": (_smooth(acceleration, 3) < -0.7).astype(float),
        "turn_signal": signal[record],
        "light": 50 + 3 * _wander(rng, rows),
    }
    columns["fwd_range_ft"], columns["fwd_range_rate_ftps"] = _radar(
        kit, motion.gap[drive, record], -motion.closing[drive, record], speed, rng
    )
    columns["rear_range_ft"], columns["rear_range_rate_ftps"] = _radar(
        kit, motion.rear_gap[drive, record], -motion.rear_closing[drive, record], None, rng
    )
    speed_ok, accel_ok = _faults(kit, columns, rng)
    table = np.stack([columns[name] for name in ALL_CHANNELS], axis=1).astype(np.float32)
    return Reading(table, speed_ok, accel_ok)


def _radar(
    kit: SensorKit, gap: Array, rate: Array, speed: Array | None, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Range (ft) and range rate (ft/s), zero where there is no target; roadside objects show up as brief targets."""
    rows = len(gap)
    seen = gap < RADAR_RANGE_M
    distance = gap + kit.radar_noise_m * rng.standard_normal(rows)
    rate = rate + 0.15 * rng.standard_normal(rows)
    for _ in range(rng.poisson(kit.radar_dropouts * rows / pipeline.RATE_HZ)):
        first = int(rng.integers(rows))
        seen[first : first + int(rng.integers(1, 15))] = False
    if speed is not None:
        for _ in range(rng.poisson(rows / 120)):
            first, length = int(rng.integers(rows)), int(rng.integers(4, 14))
            part = slice(first, first + length)
            travelled = np.cumsum(speed[part]) / pipeline.RATE_HZ
            object_gap = rng.uniform(15, 70) - travelled
            nearer = (object_gap > 2) & (~seen[part] | (object_gap < distance[part]))
            distance[part] = np.where(nearer, object_gap, distance[part])
            rate[part] = np.where(nearer, -speed[part], rate[part])
            seen[part] |= nearer
    distance = np.maximum(distance, 0.4)
    return np.where(seen, distance * FT, 0.0), np.where(seen, rate * FT, 0.0)


def _faults(kit: SensorKit, columns: dict[str, Array], rng: np.random.Generator) -> tuple[bool, bool]:
    """Faults of the real recordings, in place. Returns (speed_ok, accel_ok)."""
    rows = len(columns["t_s"])
    if not kit.has_brake:
        columns["brake"] = np.full(rows, np.nan)
    if not kit.has_speed:
        columns["speed_vehicle_mph"] = np.full(rows, -1.0)
    if rng.random() < 0.1:
        first = int(rng.integers(rows))
        columns["speed_gps_mph"][first : first + int(rng.integers(5, 60))] = rng.uniform(300, 2500)
    if rng.random() < 0.05:
        first = int(rng.integers(rows))
        columns["long_acc_g"][first : first + 3] = np.nan
    speed_ok, accel_ok = bool(rng.random() > 0.05), bool(rng.random() > 0.01)
    if not speed_ok:
        columns["speed_vehicle_mph"] = np.full(rows, columns["speed_vehicle_mph"][0])
    if not accel_ok:
        columns["long_acc_g"] = columns["long_acc_g"] * 0 - 3.5
        columns["lat_acc_g"] = columns["lat_acc_g"] * 0 + 3.5
    return speed_ok, accel_ok


def _smooth(x: Array, rows: int) -> Array:
    """Causal moving average."""
    padded = np.concatenate([np.repeat(x[:1], rows - 1), x])
    return np.convolve(padded, np.full(rows, 1 / rows), "valid")


def _wander(rng: np.random.Generator, rows: int) -> Array:
    """Slow noise of about unit standard deviation."""
    result: Array = _smooth(rng.standard_normal(rows + 9), 10)[9:] * np.sqrt(10)
    return result


def _held(x: Array, every: int) -> Array:
    """A slower sensor: each reading is repeated until the next one."""
    return x[(np.arange(len(x)) // every) * every]
