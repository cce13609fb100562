"""What three small grey cameras see of a scene: the road ahead, the driver's face, the lane to the left. Numpy, many frames at once.

Pinhole cameras over a flat road, drawn with soft edges on a grid of ``BASE`` units, whatever the number of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.driver_attention.driver import Eyes
from applications.driver_attention.traffic import FAR, LANE, LENGTH, WIDTH, Scene

Image = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
BASE = (32.0, 48.0)  # rows and columns in which the cameras' geometry is written
HALF = WIDTH / 2
TALL = 1.45  # m, of vehicles
DASH_M, DASH_PERIOD_M = 4.0, 12.0
EDGE_RIGHT, LINE, EDGE_LEFT = -LANE / 2, LANE / 2, 1.5 * LANE


@dataclass(frozen=True, kw_only=True)
class Vehicle:
    """How one vehicle's cameras sit, and what its driver looks like."""

    front_row: float
    front_column: float
    side_row: float
    side_column: float
    face_row: float
    face_column: float
    face_size: float
    skin: float
    hair: float
    glasses: bool
    beard: bool
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        return cls(
            front_row=rng.normal(0, 1.3), front_column=rng.normal(0, 2.0),
            side_row=rng.normal(0, 1.0), side_column=rng.normal(0, 2.0),
            face_row=rng.normal(0, 1.0), face_column=rng.normal(0, 1.8), face_size=rng.uniform(0.88, 1.12),
            skin=rng.uniform(95, 205), hair=rng.uniform(15, 110), glasses=bool(rng.random() < 0.25),
            beard=bool(rng.random() < 0.3), noise=rng.uniform(4, 9),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Look:
    """(m,) each, of one frame: light and surroundings. ``Look.draw`` keeps them for a clip."""

    gain: Array
    night: npt.NDArray[np.bool_]
    asphalt: Array
    verge: Array
    lead: Array  # grey of the vehicles
    beside: Array
    shadow: Array  # m along the road
    ground: Array  # phase of the verge's texture
    shake: Array  # of the cameras outside, in base units up

    @classmethod
    def draw(cls, rng: np.random.Generator, clips: int, frames: int) -> Self:
        night = rng.random(clips) < 0.2
        dim = np.where(night, 0.55, 1.0)
        each = {
            "gain": rng.uniform(0.8, 1.15, clips) * np.where(night, 0.75, 1.0),
            "night": night,
            "asphalt": rng.uniform(70, 120, clips) * dim,
            "verge": rng.uniform(50, 150, clips) * dim,
            "lead": rng.uniform(25, 210, clips) * dim,
            "beside": rng.uniform(25, 210, clips) * dim,
            "shadow": np.where(rng.random(clips) < 0.5, rng.uniform(0, 200, clips), -FAR),
            "ground": rng.uniform(0, 100, clips),
        }
        made = {k: np.repeat(v, frames) for k, v in each.items()}
        exposure = 0.05 * rng.standard_normal((clips, frames)).cumsum(axis=1)
        rough = rng.uniform(0.1, 0.7, (clips, 1)) * rng.standard_normal((clips, frames))
        made["gain"] = made["gain"] * np.exp(np.clip(exposure, -0.25, 0.25)).reshape(-1)
        return cls(**made, shake=rough.reshape(-1))


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

    def finished(self, look: Look, noise: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        grain = rng.standard_normal(self.image.shape, dtype=np.float32) * np.float32(noise)
        made: npt.NDArray[np.uint8] = np.clip(self.image * column(look.gain) + grain, 0, 255).astype(np.uint8)
        return made


def _span(centres: Image, at: Array, reach: float) -> slice:
    """The centres from the least of ``at`` - reach to the largest + reach."""
    first, last = np.searchsorted(centres, [float(at.min()) - reach, float(at.max()) + reach])
    return slice(int(first), int(last))


def column(x: npt.NDArray[Any] | float) -> Image:
    """(m,) or a number, so that it meets (m, H, W)."""
    return np.asarray(x, np.float32).reshape(-1, 1, 1)


def front(scene: Scene, look: Look, car: Vehicle, canvas: Canvas) -> None:
    """The road ahead from 1.3 m above it. scene: (m,) arrays of the frames."""
    focal, high = 40.0, 1.3
    horizon = column(11.0 + car.front_row - 0.14 * scene.acceleration + look.shake)  # the nose dives in braking
    middle = 24.0 + car.front_column
    below = canvas.v - horizon
    deep = focal * high / np.maximum(below, 0.2)
    bend = column(scene.curvature) * deep**2 / 2 - column(scene.heading) * deep
    at = column(scene.y) - (canvas.u - middle) * deep / focal - bend  # m left of our lane's middle
    along = deep + column(scene.travelled)
    sky = np.where(look.night, 35.0, 215.0)
    canvas.image[:] = column(sky)
    ground(canvas, at, along, deep / focal, canvas.inside(below), look)
    ahead = scene.lead_gap - LENGTH / 2 - 1.5, scene.beside_x - LENGTH / 2 - 1.5
    lead = -scene.y, look.lead, scene.lead_brakes
    other = scene.beside_y - scene.y, look.beside, np.zeros(len(look.gain), bool)
    first_is_lead = ahead[0] > ahead[1]
    for far in (True, False):  # the farther one first
        use = first_is_lead == far
        deep_at = np.where(use, ahead[0], ahead[1])
        sideways, grey, lit = (np.where(use, a, b) for a, b in zip(lead, other, strict=True))
        rear(canvas, deep_at, sideways, grey, lit, scene, look, focal, high, horizon, middle)


def ground(canvas: Canvas, at: Image, along: Image, foot: Image, cover: Image, look: Look) -> None:
    """Verge, asphalt, lines and shadows. at, along: m of each pixel; foot: m that a pixel spans."""
    texture = np.sin(along * np.float32(0.9) + at * np.float32(1.3) + column(look.ground))
    fading = np.minimum(1.0, 0.6 / np.maximum(foot, 1e-3))
    canvas.blend(cover, column(look.verge) + 25 * texture * fading)
    road = (at > EDGE_RIGHT - 0.5) & (at < EDGE_LEFT + 0.5)
    dark = (np.abs(along - column(look.shadow)) % 60.0) < 7.0
    grey = column(look.asphalt) * np.where(dark & (column(look.shadow) >= 0), 0.6, 1.0)
    canvas.blend(cover * road, grey)
    bright = column(np.where(look.night, 150.0, 225.0))
    wide, strength = np.float32(0.15) + foot, np.minimum(1.0, 0.4 / np.maximum(foot, 1e-3))
    for place in (EDGE_RIGHT, LINE, EDGE_LEFT):
        line = np.maximum(1 - np.abs(at - np.float32(place)) / wide, 0) * strength
        if place == LINE:
            line = line * ((along % DASH_PERIOD_M) < DASH_M)
        canvas.blend(cover * line, bright)


def rear(
    canvas: Canvas, deep: Array, sideways: Array, grey: Array, lit: Array, scene: Scene, look: Look,
    focal: float, high: float, horizon: Image, middle: float,
) -> None:  # fmt: skip
    """The back of a vehicle ``deep`` m ahead, its middle ``sideways`` m to the left of ours."""
    there = ((deep > 1.0) & (deep < 150.0)).astype(np.float32)
    z = np.clip(deep, 1.0, 150.0)
    x = sideways - scene.heading * z + scene.curvature * z**2 / 2
    u = middle - focal * x / z
    half = focal * HALF / z
    base = horizon.reshape(-1)
    bottom, top = base + focal * high / z, base + focal * (high - TALL) / z
    tall = bottom - top
    cover = canvas.box(u - half, u + half, top, bottom) * column(there)
    canvas.blend(cover, column(grey))
    canvas.blend(canvas.box(u - 0.8 * half, u + 0.8 * half, top + 0.1 * tall, top + 0.42 * tall) * column(there), 40.0)
    canvas.blend(canvas.box(u - half, u + half, bottom - 0.12 * tall, bottom) * column(there), 18.0)
    glow = np.where(lit, 255.0, np.where(look.night, 140.0, 0.7 * grey + 30.0))
    for sign in (-1.0, 1.0):
        lamp = canvas.ellipse(u + sign * 0.78 * half, top + 0.58 * tall, 0.2 * half, 0.12 * tall)
        canvas.blend(lamp * column(there), column(glow))


def side(scene: Scene, look: Look, car: Vehicle, canvas: Canvas) -> None:
    """The lane to the left, seen across from the left mirror 1 m above the road; right in the picture is ahead."""
    focal, high = 14.0, 1.0
    base = 7.0 + car.side_row + look.shake
    horizon = column(base)
    middle = 24.0 + car.side_column
    below = canvas.v - horizon
    away = focal * high / np.maximum(below, 0.2)  # m to the left
    at = column(scene.y) + HALF + away + 0 * canvas.u
    along = column(scene.travelled) + (canvas.u - np.float32(middle)) * away / focal
    canvas.image[:] = column(np.where(look.night, 35.0, 200.0))
    ground(canvas, at, along, away / focal + 0 * canvas.u + 0 * at, canvas.inside(below) + 0 * at, look)
    fence = column(EDGE_LEFT + 1.2 - HALF - scene.y)
    post = ((column(scene.travelled) + (canvas.u - np.float32(middle)) * fence / focal) % 5.0) < 0.6
    rail = canvas.inside(canvas.v - (horizon + focal * 0.3 / fence)) * canvas.inside(
        (horizon + focal * 0.75 / fence) - canvas.v
    )
    canvas.blend(rail * np.where(post, 0.9, 0.5), column(0.8 * look.verge))
    near = scene.beside_y - scene.y - WIDTH
    there = ((scene.beside_x < FAR / 2) & (near > -HALF)).astype(np.float32)
    z = np.clip(near, 0.15, 10.0)
    x = scene.beside_x - 0.5
    left, right = middle + focal * (x - LENGTH / 2) / z, middle + focal * (x + LENGTH / 2) / z
    bottom, top = base + focal * high / z, base + focal * (high - TALL) / z
    tall = bottom - top
    canvas.blend(canvas.box(left, right, top + 0.35 * tall, bottom - 0.1 * tall) * column(there), column(look.beside))
    roof = canvas.box(left + 0.22 * (right - left), right - 0.18 * (right - left), top, top + 0.4 * tall)
    canvas.blend(roof * column(there), 45.0)
    for place in (-1.35, 1.35):
        wheel = canvas.ellipse(middle + focal * (x + place) / z, bottom - 0.21 * tall, focal * 0.33 / z, 0.22 * tall)
        canvas.blend(wheel * column(there), 15.0)


def cabin(
    eyes: tuple[Array, Array, Array, Array], look: Look, car: Vehicle, canvas: Canvas, sway: tuple[Array, Array]
) -> None:
    """The driver's face. eyes: (m,) across, down, lids, nod, as in ``Eyes``; sway: (m,) of the head, in base units."""
    across, down, lids, nod = eyes
    size = car.face_size
    u = (
        24.0 + car.face_column + sway[0] - 4.0 * across
    )  # he sits facing the camera: his left is our right, mirrored here
    v = 16.0 + car.face_row + sway[1] + 2.0 * down + 3.0 * nod
    canvas.image[:] = column(np.where(look.night, 25.0, 120.0 + 0.3 * look.verge))
    window = canvas.box(u * 0 + 38.0, u * 0 + 49.0, v * 0 + 2.0, v * 0 + 18.0)
    canvas.blend(window, column(np.where(look.night, 30.0, 220.0)))
    canvas.blend(canvas.ellipse(u, v + 22.0, 19.0 * size, 11.0 * size), 0.5 * car.skin)
    canvas.blend(canvas.ellipse(u, v - 2.0, 12.0 * size, 15.0 * size), car.hair)
    canvas.blend(canvas.ellipse(u, v, 10.5 * size, 13.5 * size), car.skin)
    turn_u, turn_v = u - 3.5 * across, v + 3.0 * down + 2.0 * nod
    face = canvas.near(turn_u, turn_v, 10.0 * size, 14.0 * size)
    if car.beard:
        face.blend(face.ellipse(turn_u, turn_v + 8.5 * size, 7.0 * size, 4.5 * size), 0.6 * car.hair)
    face.blend(face.ellipse(turn_u, turn_v + 7.5 * size, 3.6 * size, 0.9 * size), 0.45 * car.skin)
    face.blend(face.box(turn_u - 0.8, turn_u + 0.8, turn_v - 1.0, turn_v + 3.5 * size), 0.8 * car.skin)
    for sign in (-1.0, 1.0):
        at_u, at_v = turn_u + sign * 4.6 * size, turn_v - 2.5 * size
        part = canvas.near(at_u, at_v, 4.5 * size, 5.0 * size)
        if car.glasses:
            part.blend(part.ellipse(at_u, at_v, 3.9 * size, 3.0 * size) * np.float32(0.35), 30.0)
        part.blend(part.box(at_u - 2.6, at_u + 2.6, at_v - 4.2 * size, at_v - 3.2 * size), 0.7 * car.hair)
        open_by = 2.0 * size * lids
        part.blend(part.ellipse(at_u, at_v, 2.9 * size, np.maximum(open_by, 0.35)), 0.4 * car.skin)
        shown = part.ellipse(at_u, at_v, 2.5 * size, open_by) * column(lids > 0.15)
        part.blend(shown, 235.0)
        part.blend(shown * part.ellipse(at_u - 1.2 * across, at_v + 0.7 * down, 1.3, 1.7), 20.0)


def pictures(
    scene: Scene, eyes: Eyes, rows: npt.NDArray[np.int64], steps: npt.NDArray[np.int64],
    car: Vehicle, rng: np.random.Generator, height: int, width: int,
) -> dict[str, npt.NDArray[np.uint8]]:  # fmt: skip
    """rows: (m,) moments, steps: (m, T) -> view -> (m, T, height, width). What is drawn depends on the scene and the eyes alone."""
    m, frames = steps.shape
    flat = Scene(**{k: v.reshape(-1) for k, v in vars(scene.take(rows, steps)).items()})
    look = Look.draw(rng, m, frames)
    seen = tuple(x[rows[:, None], steps].reshape(-1) for x in (eyes.across, eyes.down, eyes.lids, eyes.nod))
    drift = rng.normal(0, 0.35, (2, m, frames)).cumsum(axis=2)
    sway = (drift - drift.mean(axis=2, keepdims=True)).reshape(2, -1)
    made = {}
    for view in ("front", "cabin", "side"):
        canvas = Canvas.blank(m * frames, height, width)
        if view == "front":
            front(flat, look, car, canvas)
        elif view == "side":
            side(flat, look, car, canvas)
        else:
            cabin((seen[0], seen[1], seen[2], seen[3]), look, car, canvas, (sway[0], sway[1]))
        made[view] = canvas.finished(look, car.noise, rng).reshape(m, frames, height, width)
    return made
