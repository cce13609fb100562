"""What three small grey cameras see of a scene: the road ahead, the driver's face, the lane to the left. Numpy, many frames at once.

Pinhole cameras over a flat road, drawn with soft edges on a grid of ``BASE`` units, whatever the number of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from applications.driver_attention import scenery
from applications.driver_attention.canvas import Canvas, Image, Pinhole, column
from applications.driver_attention.driver import STEP_S, Eyes
from applications.driver_attention.scenery import Scenery
from applications.driver_attention.traffic import FAR, LANE, LENGTH, WIDTH, Scene

Array = npt.NDArray[np.float64]
HALF = WIDTH / 2
DASH_M, DASH_PERIOD_M = 4.0, 12.0
WINDOWS_UP_TO = 2.5  # m: lorries have none behind
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
    lead_tall: Array  # m
    beside_tall: Array
    mended: Array  # strength of the stripes and patches of another grey on the road
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
            "lead_tall": scenery.heights(rng, clips),
            "beside_tall": scenery.heights(rng, clips),
            "mended": np.where(rng.random(clips) < 0.7, rng.uniform(0.0, 0.25, clips), 0.0),
            "shadow": np.where(rng.random(clips) < 0.5, rng.uniform(0, 200, clips), -FAR),
            "ground": rng.uniform(0, 100, clips),
        }
        made = {k: np.repeat(v, frames) for k, v in each.items()}
        exposure = 0.05 * rng.standard_normal((clips, frames)).cumsum(axis=1)
        rough = rng.uniform(0.1, 0.7, (clips, 1)) * rng.standard_normal((clips, frames))
        made["gain"] = made["gain"] * np.exp(np.clip(exposure, -0.25, 0.25)).reshape(-1)
        return cls(**made, shake=rough.reshape(-1))


def front(scene: Scene, look: Look, around: Scenery, car: Vehicle, canvas: Canvas) -> None:
    """The road ahead from 1.3 m above it. scene: (m,) arrays of the frames."""
    nose = 11.0 + car.front_row - 0.14 * scene.acceleration + look.shake  # it dives in braking
    view = Pinhole(focal=40.0, high=1.3, horizon=nose, middle=24.0 + car.front_column)
    scenery.distance(canvas, around, view)
    below = canvas.v - column(nose)
    deep = view.focal * view.high / np.maximum(below, 0.2)
    bend = column(scene.curvature) * deep**2 / 2 - column(scene.heading) * deep
    at = column(scene.y) - (canvas.u - view.middle) * deep / view.focal - bend  # m left of our lane's middle
    along = deep + column(scene.travelled)
    ground(canvas, at, along, deep / view.focal, canvas.inside(below), look)
    scenery.ahead(canvas, around, scene, look.night, view)
    ahead = scene.lead_gap - LENGTH / 2 - 1.5, scene.beside_x - LENGTH / 2 - 1.5
    lead = -scene.y, look.lead, look.lead_tall, scene.lead_brakes
    other = scene.beside_y - scene.y, look.beside, look.beside_tall, np.zeros(len(look.gain), bool)
    first_is_lead = ahead[0] > ahead[1]
    for far in (True, False):  # the farther one first
        use = first_is_lead == far
        deep_at = np.where(use, ahead[0], ahead[1])
        sideways, grey, tall, lit = (np.where(use, a, b) for a, b in zip(lead, other, strict=True))
        rear(canvas, deep_at, sideways, grey, tall, lit, scene, look, view)


def ground(canvas: Canvas, at: Image, along: Image, foot: Image, cover: Image, look: Look) -> None:
    """Verge, asphalt, lines and shadows. at, along: m of each pixel; foot: m that a pixel spans."""
    texture = np.sin(along * np.float32(0.9) + at * np.float32(1.3) + column(look.ground))
    fading = np.minimum(1.0, 0.6 / np.maximum(foot, 1e-3))
    canvas.blend(cover, column(look.verge) + 25 * texture * fading)
    road = (at > EDGE_RIGHT - 0.5) & (at < EDGE_LEFT + 0.5)
    dark = (np.abs(along - column(look.shadow)) % 60.0) < 7.0
    worn = np.sin(along * np.float32(0.31) + column(look.ground)) + np.sin(
        along * np.float32(0.83) + at + 2 * column(look.ground)
    )
    worn = 1 + column(look.mended) * worn * np.minimum(1.0, 1.5 / np.maximum(foot, 1e-3))
    grey = column(look.asphalt) * worn * np.where(dark & (column(look.shadow) >= 0), 0.6, 1.0)
    canvas.blend(cover * road, grey)
    bright = column(np.where(look.night, 150.0, 225.0))
    wide, strength = np.float32(0.15) + foot, np.minimum(1.0, 0.4 / np.maximum(foot, 1e-3))
    for place in (EDGE_RIGHT, LINE, EDGE_LEFT):
        line = np.maximum(1 - np.abs(at - np.float32(place)) / wide, 0) * strength
        if place == LINE:
            line = line * ((along % DASH_PERIOD_M) < DASH_M)
        canvas.blend(cover * line, bright)


def rear(
    canvas: Canvas, deep: Array, sideways: Array, grey: Array, tall: Array, lit: Array, scene: Scene, look: Look, view: Pinhole
) -> None:  # fmt: skip
    """The back of a vehicle ``deep`` m ahead, its middle ``sideways`` m to the left of ours."""
    there = (deep > 1.0) & (deep < 150.0)
    z = np.clip(deep, 1.0, 150.0)
    u = view.column(sideways - scene.heading * z + scene.curvature * z**2 / 2, z)
    half = view.focal * HALF / z
    low = np.minimum(tall, 2.0)  # lamps and windows of the taller ones sit where those of vans do
    canvas.board(view, z, u, WIDTH, 0.0, tall, grey, there)
    canvas.board(view, z, u, 0.8 * WIDTH, 0.58 * low, 0.9 * low, 40.0, there & (tall < WINDOWS_UP_TO))
    canvas.board(view, z, u, WIDTH, 0.0, 0.12 * low, 18.0, there)
    glow = np.where(lit, 255.0, np.where(look.night, 140.0, 0.7 * grey + 30.0))
    for sign in (-1.0, 1.0):
        at, high = view.row(0.42 * low, z), 0.12 * view.focal * low / z
        lamp = canvas.ellipse(u + sign * 0.78 * half, at, 0.2 * half, high)
        canvas.blend(lamp * column(there), column(glow))


def side(scene: Scene, look: Look, around: Scenery, car: Vehicle, canvas: Canvas) -> None:
    """The lane to the left, seen across from the left mirror 1 m above the road; right in the picture is ahead."""
    base = 7.0 + car.side_row + look.shake
    view = Pinhole(focal=14.0, high=1.0, horizon=base, middle=24.0 + car.side_column)
    horizon = column(base)
    below = canvas.v - horizon
    away = view.focal * view.high / np.maximum(below, 0.2)  # m to the left
    at = column(scene.y) + HALF + away + 0 * canvas.u
    along = column(scene.travelled) + (canvas.u - np.float32(view.middle)) * away / view.focal
    canvas.image[:] = column(around.sky)
    ground(canvas, at, along, away / view.focal + 0 * canvas.u + 0 * at, canvas.inside(below) + 0 * at, look)
    scenery.beside(canvas, around, scene, look.night, view)
    fence = EDGE_LEFT + 1.2 - HALF - scene.y
    post = ((column(scene.travelled) + (canvas.u - np.float32(view.middle)) * column(fence) / view.focal) % 5.0) < 0.6
    rail = canvas.inside(canvas.v - column(view.row(0.7, fence))) * canvas.inside(
        column(view.row(0.25, fence)) - canvas.v
    )
    canvas.blend(rail * np.where(post, 0.9, 0.5), column(0.8 * look.verge))
    near = scene.beside_y - scene.y - WIDTH
    there = (scene.beside_x < FAR / 2) & (near > -HALF)
    z = np.clip(near, 0.15, 10.0)
    x = scene.beside_x - 0.5
    a_car, low = look.beside_tall < 1.8, np.minimum(look.beside_tall, 2.0)
    body = np.where(a_car, 0.65 * low, look.beside_tall)  # a car's windows are set back, the walls of a van are not
    canvas.board(view, z, view.column(-x, z), LENGTH, 0.1 * low, body, look.beside, there)
    roof = view.column(-(x + 0.02 * LENGTH), z)  # its windscreen leans more than its rear window
    canvas.board(view, z, roof, 0.6 * LENGTH, 0.6 * low, low, 45.0, there & a_car)
    for place in (-1.35, 1.35):
        middle = view.column(-(x + place), z)
        wheel = canvas.ellipse(middle, view.row(0.3, z), view.focal * 0.33 / z, view.focal * 0.32 / z)
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
    around = Scenery.draw(rng, look.night[::frames], frames, 1 / (STEP_S * float(steps[0, 1] - steps[0, 0])))
    seen = tuple(x[rows[:, None], steps].reshape(-1) for x in (eyes.across, eyes.down, eyes.lids, eyes.nod))
    drift = rng.normal(0, 0.35, (2, m, frames)).cumsum(axis=2)
    sway = (drift - drift.mean(axis=2, keepdims=True)).reshape(2, -1)
    made = {}
    for view in ("front", "cabin", "side"):
        canvas = Canvas.blank(m * frames, height, width)
        if view == "front":
            front(flat, look, around, car, canvas)
        elif view == "side":
            side(flat, look, around, car, canvas)
        else:
            cabin((seen[0], seen[1], seen[2], seen[3]), look, car, canvas, (sway[0], sway[1]))
        made[view] = canvas.finished(look.gain, car.noise, rng).reshape(m, frames, height, width)
    return made
