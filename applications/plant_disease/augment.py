"""Augmentation in training only, on uint8 images, keyed by the examples' seeds (never by rank or batch).

A plain backdrop (black or grey-violet, as in laboratory photographs) says more about who took the picture than about
the plant, so it is replaced in a share of the images: a model must not win by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_disease.config import Config
from fl_core.learning.seeding import uniform

Keys = npt.NDArray[np.uint64]
Pixels = npt.NDArray[np.uint8]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
GROUNDS = np.array(  # soil, straw, foliage, shade, concrete, sky
    [
        [0.45, 0.32, 0.22],
        [0.80, 0.70, 0.50],
        [0.35, 0.60, 0.25],
        [0.10, 0.18, 0.10],
        [0.60, 0.60, 0.60],
        [0.6, 0.75, 1.0],
    ],
    np.float32,
)
PATCHES = 4  # a made-up background has PATCHES x PATCHES random colours, blended into one another


def augment(inputs: dict[str, npt.NDArray[Any]], seeds: Keys, config: Config) -> dict[str, npt.NDArray[Any]]:
    """image (N, S, S, 3) uint8 -> the same, turned, mirrored, cropped, recoloured and with other backgrounds."""
    d = config.data
    image = np.asarray(inputs["image"], np.uint8)
    if len(image) == 0:
        return inputs
    replaced = np.flatnonzero(uniform(seeds, 0) < d.background)
    if len(replaced):
        image = image.copy()
        image[replaced] = other_background(image[replaced], seeds[replaced])
    return {**inputs, "image": recoloured(moved(image, seeds, d.zoom, d.rotate), seeds, d.colour)}


def moved(image: Pixels, seeds: Keys, zoom: float, rotate: float) -> Pixels:
    """A crop, turned by a quarter turn and up to ``rotate`` degrees, mirrored; bilinear, reflected at the edges."""
    from PIL import Image

    count, side = image.shape[:2]
    scale = 1 - zoom * uniform(seeds, 1)
    angle = np.floor(4 * uniform(seeds, 2)) * (np.pi / 2) + np.deg2rad(rotate) * (2 * uniform(seeds, 3) - 1)
    mirror = np.where(uniform(seeds, 4) < 0.5, -1.0, 1.0)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    margin = side // 4  # a turned square reaches 0.21 of its side beyond itself
    fold = np.pad(np.arange(side), margin, mode="reflect")
    padded = np.ascontiguousarray(image[:, fold][:, :, fold])
    centre = [margin + side / 2 + (1 - scale) * side * (uniform(seeds, s) - 0.5) for s in (5, 6)]
    x = np.stack([mirror * cos, sin, centre[0] - side / 2 * (mirror * cos + sin)], axis=1)
    y = np.stack([-mirror * sin, cos, centre[1] - side / 2 * (cos - mirror * sin)], axis=1)
    maps = np.concatenate([x, y], axis=1).tolist()
    made = np.empty_like(image)
    for i in range(count):  # pillow's loop over pixels is several times faster than any expression in numpy
        source = Image.fromarray(padded[i])
        made[i] = np.asarray(source.transform((side, side), Image.Transform.AFFINE, maps[i], Image.Resampling.BILINEAR))
    return made


def recoloured(image: Pixels, seeds: Keys, strength: float) -> Pixels:
    """Saturation, gain of each channel, contrast about the mean grey, brightness: one 3 x 3 matrix and one offset each."""
    u = [strength * (2 * uniform(seeds, 10 + k) - 1) for k in range(6)]
    saturation, contrast, brightness = 1 + 1.5 * u[0], 1 + u[1], 1 + u[2]
    gain = 1 + 0.4 * np.stack(u[3:6], axis=1)
    matrix = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * LUMA[:, None]
    matrix = matrix * (gain * (contrast * brightness)[:, None])[:, None, :]
    mean = image.mean(axis=(1, 2)) @ LUMA
    offset = (mean * (1 - contrast) * brightness)[:, None, None]
    shape = image.shape
    value = np.matmul(image.reshape(shape[0], -1, 3).astype(np.float32), matrix.astype(np.float32))
    value += offset.astype(np.float32)
    np.clip(value, 0, 255, out=value)
    result: Pixels = value.astype(np.uint8).reshape(shape)
    return result


def backdrop(image: Pixels) -> npt.NDArray[np.bool_]:
    """(N, S, S): black or grey-violet pixels; a leaf, green, yellow, tan or rust-red, has less blue than green."""
    red, green, blue = (image[..., c].astype(np.int16) for c in range(3))
    dark = np.maximum(np.maximum(red, green), blue) < 20
    grey = (blue >= green - 2) & (red >= green - 12) & (np.maximum(red, blue) - green < 45)
    found: npt.NDArray[np.bool_] = dark | grey
    return found


def other_background(image: Pixels, seeds: Keys) -> Pixels:
    """Where the backdrop is: the colours of one kind of ground, blended into one another."""
    count, side = image.shape[:2]
    cells = np.stack([uniform(seeds, 100 + k) for k in range(3 * PATCHES * PATCHES)], axis=1).astype(np.float32)
    cells = cells.reshape(count, PATCHES, PATCHES, 3)
    kind = (uniform(seeds, 90) * len(GROUNDS)).astype(np.int64)
    shade = (0.2 + 0.9 * uniform(seeds, 91)).astype(np.float32)
    colours = 255 * np.clip((GROUNDS[kind] * shade[:, None])[:, None, None, :] * (0.6 + 0.8 * cells), 0, 1)
    place = np.linspace(0, PATCHES - 1, side, dtype=np.float32)
    weight = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(PATCHES, dtype=np.float32)))
    made = np.einsum("yi,nijc,xj->nyxc", weight, colours, weight, optimize=True)
    return np.where(backdrop(image)[..., None], made, image).astype(np.uint8)
