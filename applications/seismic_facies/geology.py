"""Layers of several facies, folded, cut by faults and by channels: labels and reflectivity of one volume.

Structure by vertical shear and dip-slip faults as in Wu et al. (Geophysics 85, 2020, "Building realistic structure
models"): every voxel has a stratigraphic age ``u``, and facies are functions of it. Which facies lies where in depth is drawn
at random for each volume, and the strength of reflections is drawn for each unit, so that neither tells the facies by
itself (but for transparent units, and the bright base of channels); what does is how reflections are arranged, which one
needs to follow sideways to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.pipeline import UNLABELLED

Array = npt.NDArray[Any]
PARALLEL, WAVY, CLINOFORM, CHAOTIC, TRANSPARENT, CHANNEL = range(6)
LAYERED = (PARALLEL, WAVY, CLINOFORM, CHAOTIC, TRANSPARENT)
PAD = 16  # samples above and below the volume, so that the wavelet and the faults have something to reach into
AGES = 400  # length of a series over stratigraphic age


@dataclass(frozen=True, kw_only=True)
class Style:
    """What the blocks of one survey have in common. facies: share of each of the five layered facies."""

    facies: tuple[float, ...]
    dip: float
    faults: float
    channels: float
    thickness: float


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], scales: tuple[float, ...]) -> Array:
    """Gaussian random field of variance 1; ``scales``: standard deviation of its smoothing kernel along each axis."""
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    for axis, (n, scale) in enumerate(zip(shape, scales, strict=True)):
        f = np.fft.rfftfreq(n) if axis == len(shape) - 1 else np.fft.fftfreq(n)
        view = [1] * len(shape)
        view[axis] = -1
        spectrum *= np.exp(-2 * (np.pi * f * scale) ** 2).reshape(view)
    field = np.fft.irfftn(spectrum, s=shape, axes=tuple(range(len(shape))))
    return field / max(float(field.std()), 1e-12)


def ages(rng: np.random.Generator, shape: tuple[int, int, int], style: Style) -> Array:
    """Stratigraphic age of every voxel, in samples: depth less folds, dip and throws."""
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij", sparse=True)
    u = z - rng.normal(0, style.dip) * (x - shape[0] / 2) - rng.normal(0, style.dip) * (y - shape[1] / 2)
    for _ in range(int(rng.integers(2, 6))):  # folds, stronger with depth
        width = rng.uniform(20, 40)
        bump = np.exp(-((x - rng.uniform(0, shape[0])) ** 2 + (y - rng.uniform(0, shape[1])) ** 2) / (2 * width**2))
        u = u - rng.normal(0, 0.15 * width) * (0.5 + z / shape[2]) * bump
    for _ in range(int(rng.poisson(style.faults))):
        strike, lean = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.7)
        centre = [rng.uniform(0.15, 0.85) * n for n in shape]
        side = (x - centre[0]) * np.cos(strike) + (y - centre[1]) * np.sin(strike) + lean * (z - centre[2])
        along = -(x - centre[0]) * np.sin(strike) + (y - centre[1]) * np.cos(strike)
        u = u - rng.uniform(3, 12) * (side > 0) * np.exp(-((along / rng.uniform(30, 90)) ** 2))
    return u


def series(rng: np.random.Generator) -> Array:
    """Reflection coefficients over age: layers of random thickness, a coefficient at each boundary."""
    made = np.zeros(AGES)
    at = 0.0
    while at < AGES - 1:
        made[int(at)] += rng.choice((-1.0, 1.0)) * rng.uniform(0.4, 1.2)  # no single reflection rules a volume
        at += 1 + rng.exponential(1.6)
    result: Array = made / made.std()
    return result


def at_age(values: Array, age: Array) -> Array:
    """``values`` at fractional ages; the series lies symmetric about age 0 and repeats."""
    return np.interp(age.ravel() + AGES / 2, np.arange(AGES), values, period=AGES).reshape(age.shape)


def waves(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Height of sediment waves over (inline, crossline), in samples: crests that bend, steep enough to stand out from the wavelet."""
    x, y = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij")
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(12, 18)
    along = x * np.cos(angle) + y * np.sin(angle) + 3 * smooth_field(rng, shape, (10.0, 10.0))
    height = rng.uniform(0.9, 1.2) * length / (2 * np.pi)
    made: Array = height * np.sin(2 * np.pi * along / length)
    return made


def texture(rng: np.random.Generator, facies: int, unit: Array, age: Array) -> Array:
    """Reflectivity of one facies at the voxels of ``unit`` (a mask); ``age`` (of the whole volume) counts from the unit's top."""
    shape = unit.shape
    x, y, _ = np.nonzero(unit)
    below = age[unit]
    if facies == PARALLEL:
        return at_age(series(rng), below)
    if facies == WAVY:
        return at_age(series(rng), below + waves(rng, shape[:2])[x, y])
    if facies == CLINOFORM:
        angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0)
        return at_age(series(rng), below + slope * (x * np.cos(angle) + y * np.sin(angle)))
    if facies == CHAOTIC:
        return smooth_field(rng, shape, (1.5, 1.5, 0.5))[unit]
    return np.zeros(len(below))


def contrast(rng: np.random.Generator) -> float:
    """The reflection of a sequence boundary or a channel's base: two different rocks meet."""
    return float(rng.choice((-1.0, 1.0)) * rng.uniform(0.5, 1.8))


def channel_bodies(rng: np.random.Generator, age: Array, labels: Array, reflectivity: Array, count: int) -> None:
    """Sinuous incised channels, filled with concave layers, drawn into ``labels`` and ``reflectivity``."""
    shape = labels.shape
    x, y = np.meshgrid(np.arange(shape[0], dtype=float), np.arange(shape[1], dtype=float), indexing="ij")
    for _ in range(count):
        angle = rng.uniform(0, np.pi)
        along = (x - shape[0] / 2) * np.cos(angle) + (y - shape[1] / 2) * np.sin(angle)
        across = -(x - shape[0] / 2) * np.sin(angle) + (y - shape[1] / 2) * np.cos(angle)
        bend = rng.uniform(3, 9) * np.sin(2 * np.pi * along / rng.uniform(30, 70) + rng.uniform(0, 2 * np.pi))
        half, depth = rng.uniform(12, 18), rng.uniform(12, 20)
        place = ((across - bend - rng.uniform(-0.4, 0.4) * shape[1]) / half)[..., None]
        top = rng.uniform(0, shape[2])
        below = age - top
        room = depth * (1 - place**2)  # between the channel's top and its base
        inside = (np.abs(place) < 1) & (below >= 0) & (below <= room)
        fill = (below + 0.6 * depth * place**2)[inside]  # less bent than the base, on which it ends
        labels[inside] = CHANNEL
        reflectivity[inside] = at_age(series(rng), fill) * np.exp(rng.normal(0, 0.25))
        reflectivity[inside & (below > room - 1)] += 1.5 * contrast(rng)


def block(rng: np.random.Generator, shape: tuple[int, int, int], style: Style) -> tuple[Array, Array]:
    """(labels uint8, reflectivity float64), both of ``shape`` plus PAD samples at the top and at the bottom."""
    deep = (shape[0], shape[1], shape[2] + 2 * PAD)
    age = ages(rng, deep, style)
    labels = np.full(deep, UNLABELLED, np.uint8)
    reflectivity = np.zeros(deep)
    top, end, facies = float(age.min()), float(age.max()) + 4, -1  # surfaces vary by 3 about their mean
    surface = np.full((*deep[:2], 1), top)
    while top < end:
        top += max(7.0, style.thickness * rng.uniform(0.6, 1.6))
        base = top + np.clip(1.2 * smooth_field(rng, deep[:2], (8.0, 8.0)), -3, 3)[..., None]
        share = np.array(style.facies)
        if facies >= 0:
            share[facies] = 0.0
        facies = int(rng.choice(LAYERED, p=share / share.sum()))
        unit = (age >= surface) & (age < base)
        if unit.any():
            made = texture(rng, facies, unit, age - surface) * np.exp(rng.normal(0, 0.25))
            labels[unit] = facies
            reflectivity[unit] = made + rng.uniform(0.02, 0.12) * rng.standard_normal(len(made))
            reflectivity[unit & (age < surface + 1)] += contrast(rng)
        surface = base
    channel_bodies(rng, age, labels, reflectivity, int(rng.poisson(style.channels)))
    return labels, reflectivity
