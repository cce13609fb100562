"""Frames of one camera as soft-edged shapes in grey, written in base units whatever their resolution."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
BASE = (32.0, 48.0)  # rows and columns in which the cameras' geometry is written


class Pinhole(NamedTuple):
    """A camera over a flat road, looking along it (or across it, for the one to the side)."""

    focal: float  # base units
    high: float  # m above the road
    horizon: Array  # (m,) rows
    middle: float  # column of straight ahead

    def row(self, height: Array | float, away: Array) -> Array:
        """(m,): of what is ``height`` m above the road, ``away`` m from the camera."""
        found: Array = self.horizon + self.focal * (self.high - height) / away
        return found

    def column(self, aside: Array, away: Array) -> Array:
        """(m,): of what is ``aside`` m to the left, ``away`` m from the camera."""
        found: Array = self.middle - self.focal * aside / away
        return found


class Canvas:
    """(m, H, W) frames; u, v: column and row of each pixel's centre in base units."""

    def __init__(self, image: Image, u: Image, v: Image, soft: float) -> None:
        self.image, self.u, self.v, self.soft = image, u, v, soft

    @classmethod
    def blank(cls, count: int, height: int, width: int) -> Self:
        v = ((np.arange(height, dtype=np.float32) + 0.5) * (BASE[0] / height))[None, :, None]
        u = ((np.arange(width, dtype=np.float32) + 0.5) * (BASE[1] / width))[None, None, :]
        soft = max(BASE[0] / height, BASE[1] / width)
        return cls(np.zeros((count, height, width), np.float32), u, v, soft)

    def near(self, u: Array, v: Array, across: float, high: float) -> Self:
        """The part of the same frames that holds everything within (across, high) of the points (u, v)."""
        rows = _span(self.v.reshape(-1), v, high + self.soft)
        columns = _span(self.u.reshape(-1), u, across + self.soft)
        return type(self)(self.image[:, rows, columns], self.u[:, :, columns], self.v[:, rows], self.soft)

    def blend(self, cover: npt.NDArray[np.floating], value: npt.NDArray[np.floating] | float) -> None:
        self.image += np.asarray(cover, np.float32) * (np.asarray(value, np.float32) - self.image)

    def inside(self, distance: npt.NDArray[np.floating]) -> Image:
        """1 where ``distance`` to an edge is positive, 0 outside, soft over one pixel."""
        found: Image = np.clip(np.asarray(distance, np.float32) * np.float32(1 / self.soft) + np.float32(0.5), 0, 1)
        return found

    def box(self, left: Array, right: Array, top: Array, bottom: Array) -> Image:
        across = self.inside(self.u - column(left)) * self.inside(column(right) - self.u)
        high = self.inside(self.v - column(top)) * self.inside(column(bottom) - self.v)
        found: Image = across * high
        return found

    def ellipse(self, u: Array, v: Array, across: Array | float, high: Array | float) -> Image:
        a, b = (np.maximum(column(x), np.float32(0.05)) for x in (across, high))
        away = np.sqrt(((self.u - column(u)) / a) ** 2 + ((self.v - column(v)) / b) ** 2)
        cover = self.inside((1 - away) * np.minimum(a, b))
        found: Image = cover * (np.abs(self.u - column(u)) < a + self.soft)  # soft at its edge, not along a flat one
        return found

    def board(
        self, view: Pinhole, away: Array, at: Array, wide: Array | float, low: Array | float, high: Array | float,
        grey: Array | float, there: npt.NDArray[Any] | bool = True,
    ) -> None:  # fmt: skip
        """An upright board ``away`` m from the camera, ``wide`` m across around column ``at``, from ``low`` to ``high`` m above the road."""
        half = view.focal * wide / (2 * away)
        cover = self.box(at - half, at + half, view.row(high, away), view.row(low, away))
        self.blend(cover * column(there), column(grey))

    def finished(self, gain: Array, noise: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        grain = rng.standard_normal(self.image.shape, dtype=np.float32) * np.float32(noise)
        made: npt.NDArray[np.uint8] = np.clip(self.image * column(gain) + grain, 0, 255).astype(np.uint8)
        return made


def _span(centres: Image, at: Array, reach: float) -> slice:
    """The centres from the least of ``at`` - reach to the largest + reach."""
    first, last = np.searchsorted(centres, [float(at.min()) - reach, float(at.max()) + reach])
    return slice(int(first), int(last))


def column(x: npt.NDArray[Any] | float) -> Image:
    """(m,) or a number, so that it meets (m, H, W)."""
    return np.asarray(x, np.float32).reshape(-1, 1, 1)
