"""What the cameras outside see that has no part in any conflict: sky, hills, trees and posts, gantries, and who comes towards us beyond the rail.

Each clip has its own, moving past as the road does; nothing here looks at the scene's other vehicles or at what happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from applications.driver_attention.canvas import BASE, Canvas, Pinhole, column
from applications.driver_attention.traffic import FAR, LANE, LENGTH, WIDTH, Scene

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
NEAREST_M, FARTHEST_M = 6.0, 110.0
STANDING = 3  # of each side of the road that are drawn
COMING = 2  # vehicles that come towards us
ACROSS = 2.9 * LANE  # m left of our lane's middle, where they drive
RIGHT, LEFT = 0, 1


@dataclass(frozen=True, kw_only=True)
class Scenery:
    """(m,) each, of one frame; (m, 2) of what stands on the right and on the left. The same all through a clip but for ``seconds``."""

    sky: Array
    hills: Array  # rows above the horizon, on average
    ridge: Array  # (m, 3): phases of their outline
    hills_grey: Array
    stands: Mask
    spacing: Array  # m along the road
    first: Array  # m along the road
    aside: Array  # m left of our lane's middle
    tall: Array
    wide: Array
    grey: Array
    gantry: Array  # m along the road; -FAR: none
    gantry_grey: Array
    gaps: Array  # m between vehicles that come towards us; 0: nobody does
    coming: Array  # m ahead, when the clip begins
    coming_speed: Array
    seconds: Array  # since the clip began

    @classmethod
    def draw(cls, rng: np.random.Generator, night: Mask, frames: int, rate_hz: float) -> Self:
        """night: (clips,)"""
        n = len(night)
        dim = np.where(night, 0.4, 1.0)
        posts = rng.random((n, 2)) < 0.4
        each = {
            "sky": np.where(night, 35.0, rng.uniform(150, 235, n)),
            "hills": np.where(rng.random(n) < 0.7, rng.uniform(0.5, 5.0, n), 0.0),
            "ridge": rng.uniform(0, 2 * np.pi, (n, 3)),
            "hills_grey": rng.uniform(40, 170, n) * dim,
            "stands": rng.random((n, 2)) < 0.7,
            "spacing": rng.uniform(14.0, 45.0, (n, 2)),
            "first": rng.uniform(0.0, 45.0, (n, 2)),
            "aside": np.array([-1.0, 1.0]) * rng.uniform([4.0, 2.0 * LANE], [8.0, 2.7 * LANE], (n, 2)),
            "tall": rng.uniform(3.0, 10.0, (n, 2)),
            "wide": np.where(posts, rng.uniform(0.2, 0.5, (n, 2)), rng.uniform(1.0, 4.0, (n, 2))),
            "grey": rng.uniform(20, 130, (n, 2)) * dim[:, None],
            "gantry": np.where(rng.random(n) < 0.3, rng.uniform(0, 150, n), -FAR),
            "gantry_grey": rng.uniform(30, 160, n) * dim,
            "gaps": np.where(rng.random(n) < 0.6, rng.uniform(30, 120, n), 0.0),
            "coming": rng.uniform(0, 100, n),
            "coming_speed": rng.uniform(10, 30, n),
        }
        made = {k: np.repeat(v, frames, axis=0) for k, v in each.items()}
        return cls(**made, seconds=np.tile(np.arange(frames) / rate_hz, n))

    def comes_at(self, scene: Scene) -> tuple[Array, Array]:
        """(m,) each: how far ahead one of those is who come towards us, and the gaps between them."""
        return self.coming - scene.travelled - self.coming_speed * self.seconds, np.maximum(self.gaps, 1.0)


def heights(rng: np.random.Generator, count: int) -> Array:
    """(count,) m: of cars, vans and lorries."""
    kind = rng.choice(3, size=count, p=[0.65, 0.2, 0.15])
    made: Array = rng.uniform(np.array([1.35, 1.8, 2.8])[kind], np.array([1.6, 2.3, 3.6])[kind])
    return made


def distance(canvas: Canvas, around: Scenery, view: Pinhole) -> None:
    """Sky, and hills before it."""
    canvas.image[:] = column(around.sky)
    phase = around.ridge.astype(np.float32)[:, :, None, None]
    turns = 2 * np.pi * canvas.u / np.float32(BASE[1])
    outline = sum(np.sin((k + 1) * turns + phase[:, k]) for k in range(3))
    above = column(around.hills) * np.maximum(1 + np.float32(0.3) * outline, 0)
    horizon = column(view.horizon)
    canvas.blend(
        canvas.inside(canvas.v - horizon + above) * canvas.inside(horizon - canvas.v), column(around.hills_grey)
    )


def ahead(canvas: Canvas, around: Scenery, scene: Scene, night: Mask, view: Pinhole) -> None:
    """What stands over and beside the road, and who comes towards us, each the farther first."""

    def board(
        away: Array,
        aside: Array | float,
        wide: Array | float,
        low: float,
        high: Array | float,
        grey: Array,
        there: Mask | bool = True,
    ) -> None:
        shown = there & (away > NEAREST_M) & (away < FARTHEST_M)
        z = np.clip(away, NEAREST_M, FARTHEST_M)
        at = view.column(aside - scene.y - scene.heading * z + scene.curvature * z**2 / 2, z)
        canvas.board(view, z, at, wide, low, high, grey, shown)

    board(around.gantry - scene.travelled, 0.0, 11 * LANE, 5.2, 6.8, around.gantry_grey)
    for side in (RIGHT, LEFT):
        aside, wide, tall, grey, spacing = (
            x[:, side] for x in (around.aside, around.wide, around.tall, around.grey, around.spacing)
        )
        nearest = after(around.first[:, side] - scene.travelled, spacing)
        for k in reversed(range(STANDING)):
            board(nearest + k * spacing, aside, wide, 0.0, tall, grey, around.stands[:, side])
    place, gaps = around.comes_at(scene)
    nearest = after(place, gaps)
    for k in reversed(range(COMING)):
        board(nearest + k * gaps, ACROSS, WIDTH, 0.0, 1.5, body(around, night), around.gaps > 0)
        board(nearest + k * gaps, ACROSS, 0.8 * WIDTH, 0.5, 0.8, np.where(night, 255.0, 200.0), around.gaps > 0)


def beside(canvas: Canvas, around: Scenery, scene: Scene, night: Mask, view: Pinhole) -> None:
    """The same on the left as the camera to that side sees it pass."""
    mirror = scene.y + WIDTH / 2
    aside, wide, tall, grey, first, spacing = (
        x[:, LEFT] for x in (around.aside, around.wide, around.tall, around.grey, around.first, around.spacing)
    )
    z = aside - mirror
    at = view.column(-nearest_to_us(first - scene.travelled, spacing), z)
    canvas.board(view, z, at, wide, 0.0, tall, grey, around.stands[:, LEFT])
    place, gaps = around.comes_at(scene)
    z = ACROSS - mirror
    canvas.board(
        view, z, view.column(-nearest_to_us(place, gaps), z), LENGTH, 0.3, 1.4, body(around, night), around.gaps > 0
    )


def body(around: Scenery, night: Mask) -> Array:
    """(m,): the grey of who comes towards us."""
    return np.where(night, 20.0, 60.0 + around.coming)


def after(place: Array, spacing: Array) -> Array:
    """(m,): the first of the places ``place`` + k ``spacing`` that is NEAREST_M ahead or more."""
    found: Array = place + np.ceil((NEAREST_M - place) / spacing) * spacing
    return found


def nearest_to_us(place: Array, spacing: Array) -> Array:
    """(m,): of the places ``place`` + k ``spacing`` the one nearest to our middle."""
    found: Array = (place + spacing / 2) % spacing - spacing / 2
    return found
