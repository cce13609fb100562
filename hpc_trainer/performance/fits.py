"""Laws fitted to measurements, each with the 95 % interval of Student's t; too few points give no interval, and no fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEAST_POINTS = 3
# Student's t, two-sided 95 %, by degrees of freedom; beyond, the normal distribution with Cornish and Fisher's correction.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def document(self) -> dict[str, float]:
        return asdict(self)


def t_975(freedom: int) -> float:
    if freedom < 1:
        return math.inf
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def least_squares(columns: Floats, y: Floats, weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Coefficients (K,) and their covariance (K, K) for columns (N, K); ``weights`` are 1 / standard deviation."""
    w = np.ones(len(y)) if weights is None else weights
    x, z = columns * w[:, None], y * w
    found, *_ = np.linalg.lstsq(x, z, rcond=None)
    freedom = len(y) - columns.shape[1]
    spread = float(np.sum((z - x @ found) ** 2) / freedom) if freedom > 0 else math.inf
    return found.astype(np.float64), np.asarray(spread * np.linalg.pinv(x.T @ x), np.float64)


def _enough(points: Sequence[Any]) -> bool:
    return len(set(points)) >= LEAST_POINTS


def _interval(value: float, variance: float, freedom: int, low: float = -math.inf, high: float = math.inf) -> Value:
    half = t_975(freedom) * math.sqrt(max(0.0, variance))
    return Value(value, max(low, value - half), min(high, value + half))


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[Value, Value] | None:
    """Hockney's model of a message: seconds = alpha + beta * size, by relative errors (1994). None under three sizes."""
    if not _enough(sizes):
        return None
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    found, covariance = least_squares(np.stack([np.ones_like(x), x], axis=1), y, 1 / y)
    freedom = len(y) - 2
    return (
        _interval(float(found[0]), float(covariance[0, 0]), freedom, low=0.0),
        _interval(float(found[1]), float(covariance[1, 1]), freedom, low=0.0),
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> Value | None:
    """The power p of value = c * size^p, by a straight line through the logarithms. None under three sizes."""
    if not _enough(sizes) or min(values) <= 0:
        return None
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    found, covariance = least_squares(np.stack([np.ones_like(x), x], axis=1), y)
    return _interval(float(found[1]), float(covariance[1, 1]), len(y) - 2)


def amdahl(processes: Sequence[int], seconds: Sequence[float]) -> Value | None:
    """The serial fraction s of T(p) = T(1) (s + (1 - s) / p) (Amdahl 1967), from strong scaling. None under three counts."""
    if not _enough(processes):
        return None
    p, y = np.asarray(processes, float), np.asarray(seconds, float)
    (a, b), covariance = least_squares(np.stack([np.ones_like(p), 1 / p], axis=1), y, 1 / y)
    whole = a + b
    gradient = np.array([b, -a]) / whole**2
    return _interval(float(a / whole), float(gradient @ covariance @ gradient), len(y) - 2, -1.0, 1.0)


def gustafson(processes: Sequence[int], seconds: Sequence[float]) -> Value | None:
    """The serial fraction s of the scaled speed-up S(p) = p - s (p - 1) (Gustafson 1988), from weak scaling.

    S(p) = p T(1) / T(p). None under three counts.
    """
    if not _enough(processes):
        return None
    p, y = np.asarray(processes, float), np.asarray(seconds, float)
    speedup = p * y[p.argmin()] / y * (1 / p.min())
    beyond = p / p.min() - 1
    keep = beyond > 0
    found, covariance = least_squares(beyond[keep, None], (p / p.min() - speedup)[keep])
    return _interval(float(found[0]), float(covariance[0, 0]), int(keep.sum()) - 1, -1.0, 1.0)


def karp_flatt(speedup: float, processes: float) -> float | None:
    """The experimentally determined serial fraction (1/S - 1/p) / (1 - 1/p) (Karp & Flatt 1990); None for one process."""
    return (1 / speedup - 1 / processes) / (1 - 1 / processes) if processes > 1 else None


def median_interval(values: Sequence[float]) -> Value:
    """The median and the order statistics that enclose it with at least 95 %; the extremes under six values."""
    ordered = sorted(values)
    n = len(ordered)
    reach = 0
    if n >= 6:
        reach = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2) - 1)
    return Value(float(np.median(ordered)), ordered[reach], ordered[n - 1 - reach])
