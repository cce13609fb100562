"""In-field photographs of crops by rule: a pinhole camera over rows of plants, with the plant that each pixel shows.

A plant is a set of leaf blades in space: maize (leaves in two ranks, distichous phyllotaxis, blades that rise and bend down) or a
rosette (leaves at the golden angle, flat, on petioles). Blades are cut into quadrilaterals, projected, and painted from
the farthest to the nearest, so that occlusion follows from geometry. Lengths are in metres, the ground is z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.imagery.colour import smooth

Floats = npt.NDArray[Any]
Rng = np.random.Generator
CROPS = ("maize", "rosette")
GOLDEN_ANGLE = np.deg2rad(137.508)
SEGMENTS = 8  # of a blade, along its midrib
SUPER = 2  # samples of a pixel along each axis
LEAF, MIDRIB, STEM, WEED, BLIGHT, RUST, YELLOWED = range(7)  # what a painted pixel is of
SICK = ("blight", "rust", "chlorosis")
SOILS = np.array(  # dark loam, brown loam, red clay, light sand, grey clay
    [[0.20, 0.15, 0.11], [0.36, 0.27, 0.19], [0.48, 0.27, 0.17], [0.62, 0.52, 0.38], [0.46, 0.43, 0.39]], np.float32
)
STRAW = np.array([0.74, 0.64, 0.42], np.float32)
TAN, ORANGE = np.array([0.66, 0.54, 0.33], np.float32), np.array([0.62, 0.30, 0.08], np.float32)
YELLOW = np.array([0.72, 0.70, 0.22], np.float32)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field: what all its photographs share. Heights and spacings in metres, pitch in degrees from straight down."""

    crop: str
    stage: float
    soil: Floats
    straw: float
    row_spacing: float
    plant_spacing: float
    missing: float
    weeds: float
    green: Floats
    camera_height: float
    view: float
    pitch: float
    sun: Floats
    shadow: float
    gain: Floats
    exposure: float
    noise: float
    blur: float

    @classmethod
    def draw(cls, rng: Rng, *, maize_share: float = 0.6, view: float = 0.85) -> Field:
        """view: width of the ground in the middle of a picture, in metres, of an average field."""
        crop = "maize" if rng.random() < maize_share else "rosette"
        elevation, azimuth = np.deg2rad(rng.uniform(25, 75)), rng.uniform(0, 2 * np.pi)
        soil = SOILS[rng.integers(len(SOILS))] * rng.uniform(0.75, 1.25) + rng.normal(0, 0.03, 3)
        green = np.array([0.26, 0.47, 0.16]) + rng.normal(0, [0.05, 0.06, 0.04])
        return cls(
            crop=crop,
            stage=float(rng.uniform(0.0, 1.0)),
            soil=soil.clip(0.05, 0.8).astype(np.float32),
            straw=float(rng.choice([0.0, rng.uniform(0, 0.6)])),
            row_spacing=float(rng.uniform(0.36, 0.55)),
            plant_spacing=float(rng.uniform(0.14, 0.24)),
            missing=float(rng.uniform(0.0, 0.3)),
            weeds=float(rng.choice([0.0, rng.uniform(2, 14)])),
            green=green.clip(0.06, 0.8).astype(np.float32),
            camera_height=float(rng.uniform(0.9, 1.8)),
            view=float(view * rng.uniform(0.85, 1.15)),
            pitch=float(rng.uniform(0, 35)),
            sun=np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], np.float32),
            shadow=float(rng.choice([0.0, rng.uniform(0.25, 0.65)])),
            gain=np.exp(rng.normal(0, [0.08, 0.03, 0.10])).astype(np.float32),
            exposure=float(rng.uniform(0.75, 1.25)),
            noise=float(rng.uniform(0.006, 0.03)),
            blur=float(rng.uniform(0.0, 0.7)),
        )  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One photograph. image: (H, W, 3) uint8; plants: (H, W) int32, 0 = ground and weeds, else the plant's number, from 1;
    lesions: (H, W) bool, diseased tissue."""

    image: npt.NDArray[np.uint8]
    plants: npt.NDArray[np.int32]
    lesions: npt.NDArray[np.bool_]


Row = tuple[float, ...]


@dataclass
class Quads:
    """Quadrilaterals in space. corners: (Q, 4, 3); value: plant << 16 | material << 8 | shade; lift: how much nearer to the
    camera than its place each one counts, which keeps a midrib or a lesion above its blade."""

    corners: list[Floats] = field(default_factory=list)
    value: list[npt.NDArray[np.int64]] = field(default_factory=list)
    lift: list[Floats] = field(default_factory=list)

    def add(self, corners: Floats, plant: Floats, material: Any, shade: Any, lift: float) -> None:
        """corners: (..., 4, 3); the rest broadcast to (...)."""
        shape = corners.shape[:-2]
        level = np.clip(np.broadcast_to(shade, shape) * 128, 1, 255).astype(np.int64)
        code = (np.broadcast_to(plant, shape).astype(np.int64) << 16) | (
            np.broadcast_to(material, shape).astype(np.int64) << 8
        )
        self.corners.append(corners.reshape(-1, 4, 3))
        self.value.append((code | level).ravel())
        self.lift.append(np.full(level.size, lift))


def draw(rng: Rng, site: Field, side: int, *, sick: str = "", share: float = 0.5) -> Scene:
    """One photograph of ``side`` x ``side`` pixels. sick: a symptom that ``share`` of the plants show, one plant at least."""
    camera = Camera(rng, site)
    places = _places(rng, site)
    near, _ = camera.project(np.pad(places, ((0, 0), (0, 1))))
    places = places[(np.abs(near - 0.5) < 0.5 + 0.35 / site.view).all(1)]
    ill = rng.random(len(places)) < share
    if len(places):
        ill[np.argmin(np.linalg.norm(places, axis=1))] = True
    tints = np.ones((len(places) + 2, 3), np.float32)
    tints[1:-1] = np.exp(rng.normal(0, 0.06, (len(places), 3)))
    rows: list[Row] = []
    for number, place in enumerate(places, start=1):
        grown = float(np.clip(site.stage + rng.normal(0, 0.12), 0, 1))
        grow = _maize if site.crop == "maize" else _rosette
        rows += grow(rng, number, place, grown, bool(ill[number - 1]))
    weed = len(places) + 1
    for _ in range(rng.poisson(site.weeds)):
        rows += _weed(rng, weed, rng.uniform([-0.8, -0.9], [0.8, 1.1]))
    quads, outlines = _blades(rng, np.array(rows).reshape(-1, len(COLUMNS)), site, sick, weed)
    if site.crop == "maize" and len(places):
        _stems(quads, places, 0.02 + 0.10 * site.stage)
    fine = side * SUPER
    codes = camera.paint(quads, fine)
    picture, diseased = _colours(codes, site, tints, weed)
    picture = np.where((codes > 0)[..., None], picture, _soil(rng, site, fine, camera.shadow(outlines, site, fine)))
    plants = _majority(np.where((codes >> 16) == weed, 0, codes >> 16).astype(np.int32))
    lesions = _pooled(diseased[..., None].astype(np.float32))[..., 0] >= 0.5
    return Scene(_photograph(rng, site, _pooled(picture)), plants, lesions & (plants > 0))


class Camera:
    """A pinhole camera above the origin; ``project`` gives pixels and distances."""

    def __init__(self, rng: Rng, site: Field) -> None:
        pitch = np.deg2rad(max(0.0, site.pitch + rng.normal(0, 3)))
        yaw = rng.normal(0, np.deg2rad(12))
        height = site.camera_height * rng.uniform(0.95, 1.05)
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        forward, up = np.array([0, np.sin(pitch), -np.cos(pitch)]), np.array([0, np.cos(pitch), np.sin(pitch)])
        self.at = turn @ np.array([0, -height * np.tan(pitch), height])  # looks at the origin
        self.axes = np.stack([turn @ np.array([1.0, 0, 0]), turn @ up, turn @ forward])
        self.focal = height / np.cos(pitch) / site.view

    def project(self, points: Floats) -> tuple[Floats, Floats]:
        """(..., 3) -> (..., 2) column and row in parts of the picture's side, (...) distance; behind the camera: far outside."""
        seen = (points - self.at) @ self.axes.T
        depth = np.maximum(seen[..., 2], 0.05)
        flat = np.stack([0.5 + self.focal * seen[..., 0] / depth, 0.5 - self.focal * seen[..., 1] / depth], -1)
        return flat, np.linalg.norm(points - self.at, axis=-1)

    def paint(self, quads: Quads, side: int) -> npt.NDArray[np.int32]:
        """(side, side): the value of the nearest quadrilateral, 0 where there is none."""
        from PIL import Image, ImageDraw

        canvas = Image.new("I", (side, side), 0)
        if quads.corners:
            flat, distance = self.project(np.concatenate(quads.corners))
            value, order = np.concatenate(quads.value), distance.mean(1) - np.concatenate(quads.lift)
            pen = ImageDraw.Draw(canvas)
            pixels = flat * side - 0.5
            shown = np.flatnonzero((pixels.max(1) > 0).all(1) & (pixels.min(1) < side).all(1))
            shown = shown[np.argsort(-order[shown], kind="stable")]
            for corners, code in zip(pixels[shown].reshape(-1, 8).tolist(), value[shown].tolist(), strict=True):
                pen.polygon(corners, fill=code)
        return np.array(canvas, np.int32)

    def shadow(self, outlines: Floats, site: Field, side: int) -> Floats:
        """(side, side): share of the sun that the blades (B, P, 3) take from the ground."""
        from PIL import Image, ImageDraw

        canvas = Image.new("L", (side // 2, side // 2), 0)
        if site.shadow > 0 and len(outlines):
            pen = ImageDraw.Draw(canvas)
            flat, _ = self.project(outlines - outlines[..., 2:] / site.sun[2] * site.sun)
            for corners in (flat * (side // 2)).reshape(len(flat), -1).tolist():
                pen.polygon(corners, fill=255)
        made = np.asarray(canvas, np.float32) / 255
        for axis in (0, 1):
            made = (np.roll(made, 1, axis) + made + np.roll(made, -1, axis)) / 3
        shaded: Floats = made.repeat(2, 0).repeat(2, 1)
        return shaded


def _places(rng: Rng, site: Field) -> Floats:
    """(P, 2): plants in rows along y, each moved and some missing."""
    offset, phase = rng.uniform(-0.5, 0.5) * site.row_spacing, rng.uniform(0, site.plant_spacing)
    rows = np.arange(-3, 4) * site.row_spacing + offset
    along = np.arange(-0.9, 1.3, site.plant_spacing) + phase
    grid = np.stack(np.meshgrid(rows, along, indexing="ij"), -1).reshape(-1, 2)
    grid = grid + rng.normal(0, [0.015, 0.025], grid.shape)
    kept: Floats = grid[rng.random(len(grid)) >= site.missing]
    reach = 0.75 * site.view + 0.35
    return kept[(np.abs(kept) < reach).all(1)]


# One leaf: whose it is, where it starts, which way it goes, how long and wide, its angles from the vertical at both ends, ...
COLUMNS = ("plant", "x", "y", "z", "turn", "length", "width", "start", "end", "taper", "weed", "ill")


def _maize(rng: Rng, number: int, place: Floats, grown: float, ill: bool) -> list[Row]:
    """Three to seven leaves in two ranks; the lower ones are older, longer and bend further down."""
    count = 3 + round(4 * grown)
    azimuth, size = rng.uniform(0, np.pi), 0.11 + 0.15 * grown
    rows = []
    for k in range(count):
        age = 1 - k / count
        length = size * (0.75 + 0.5 * np.sin(np.pi * (0.25 + 0.6 * age))) * rng.uniform(0.85, 1.15)
        bend = np.deg2rad(rng.uniform(18, 38)), np.deg2rad(rng.uniform(75, 105) + 35 * age)
        turn, root = azimuth + np.pi * (k % 2) + rng.normal(0, 0.18), (0.02 + 0.10 * grown) * (k + 1) / count
        width = (0.022 + 0.018 * grown) * rng.uniform(0.85, 1.2)
        rows.append((number, *place, root, turn, length, width, *bend, 0.55, 0.0, float(ill)))
    return rows


def _rosette(rng: Rng, number: int, place: Floats, grown: float, ill: bool) -> list[Row]:
    """Five to eleven leaves at the golden angle, the younger ones shorter and more upright."""
    count = 5 + round(6 * grown)
    turn, size = rng.uniform(0, 2 * np.pi), 0.065 + 0.085 * grown
    rows = []
    for k in range(count):
        young = k / count
        length = size * (1.1 - 0.7 * young) * rng.uniform(0.88, 1.12)
        tilt = np.deg2rad(rng.uniform(62, 78) - 35 * young)
        bend = tilt, tilt + np.deg2rad(15)
        rows.append(
            (
                number,
                *place,
                0.01 + 0.02 * young,
                turn + k * GOLDEN_ANGLE,
                length,
                0.46 * length,
                *bend,
                1.5,
                0.0,
                float(ill),
            )
        )
    return rows


def _weed(rng: Rng, number: int, place: Floats) -> list[Row]:
    """A seedling of a few small leaves, which belongs to no plant of the crop."""
    rows = []
    for k in range(rng.integers(2, 6)):
        length, tilt = rng.uniform(0.012, 0.035), np.deg2rad(rng.uniform(60, 85))
        turn, width = k * GOLDEN_ANGLE + rng.uniform(0, 0.4), rng.uniform(0.3, 0.6) * length
        rows.append((number, *place, 0.004, turn, length, width, tilt, tilt, 1.0, 1.0, 0.0))
    return rows


def _stems(quads: Quads, places: Floats, height: float) -> None:
    half = np.array([[-0.006, 0, 0], [0.006, 0, 0], [0.006, 0, height], [-0.006, 0, height]])
    quads.add(
        np.pad(places, ((0, 0), (0, 1)))[:, None] + half, np.arange(1, len(places) + 1), STEM, np.float64(0.9), 0.0
    )


def _blades(rng: Rng, leaves: Floats, site: Field, sick: str, weed: int) -> tuple[Quads, Floats]:
    """(quadrilaterals, outlines (B, P, 3)): each blade is two halves along a midrib that bends from ``start`` to ``end``."""
    quads = Quads()
    if not len(leaves):
        return quads, np.zeros((0, 1, 3))
    leaf = {name: leaves[:, k, None] for k, name in enumerate(COLUMNS)}
    count, up = len(leaves), np.array([0, 0, 1.0])
    t = np.linspace(0, 1, SEGMENTS + 1)
    angle = leaf["start"] + (leaf["end"] - leaf["start"]) * t**1.4
    step = leaf["length"] / SEGMENTS
    out, rise = (np.pad(np.cumsum(step * f(angle[:, :-1]), 1), ((0, 0), (1, 0))) for f in (np.sin, np.cos))
    along = np.stack([np.cos(leaves[:, 4]), np.sin(leaves[:, 4]), np.zeros(count)], 1)[:, None]
    across = np.stack([-np.sin(leaves[:, 4]), np.cos(leaves[:, 4]), np.zeros(count)], 1)[:, None]
    middle = leaves[:, None, 1:4] + out[..., None] * along + np.maximum(rise, 0.003 - leaf["z"])[..., None] * up
    wave = 1 + 0.06 * np.sin(t * rng.uniform(10, 25, (count, 1)))
    half = (0.5 * leaf["width"] * np.sin(np.pi * np.clip(t, 0.02, 1) ** leaf["taper"]) ** 0.75 * wave)[..., None]
    twist = rng.normal(0, 0.25, (count, 1, 1))
    tangent = np.cos(angle)[..., None] * up + np.sin(angle)[..., None] * along
    tone = rng.uniform(0.85, 1.15, (count, 1))
    material = np.where(leaf["weed"] > 0, WEED, LEAF) + np.zeros(SEGMENTS)
    yellow = (leaf["ill"] > 0) & (rng.random((count, 1)) < 0.6) & (t[:-1] > rng.uniform(0.1, 0.5, (count, 1)))
    if sick == "chlorosis":  # from the tip
        material = np.where(yellow, YELLOWED, material)
    edges = []
    for s in (-1.0, 1.0):
        side = across * np.cos(twist) * s + up * (np.sin(twist) * s + 0.25)
        edge = middle + half * side
        edges.append(edge)
        normal = np.cross(tangent[:, :-1], np.broadcast_to(side, tangent[:, :-1].shape))
        normal *= np.sign(normal[..., 2:]) / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
        lit = 0.62 + (0.25 + 0.5 * site.shadow) * np.clip(normal @ site.sun, 0, 1)
        quads.add(strip(middle, edge), leaf["plant"], material, tone * lit * (1.0 if s > 0 else 0.93), 0.0)
    rib = 0.10 * half * across
    ribbed = (leaf["weed"][:, 0] == 0) & ~((material == YELLOWED).any(1))
    quads.add(strip(middle - rib, middle + rib)[ribbed], leaf["plant"][ribbed], MIDRIB, 1.1 * tone[ribbed], 0.001)
    if sick in ("blight", "rust"):
        ill = np.flatnonzero(leaf["ill"][:, 0] > 0)
        _lesions(rng, quads, leaves[ill, 0], (middle[ill], edges[0][ill], edges[1][ill]), sick)
    return quads, np.concatenate([edges[0], edges[1][:, ::-1]], 1)


def strip(a: Floats, b: Floats) -> Floats:
    """(..., P, 3) twice -> (..., P - 1, 4, 3): the quadrilaterals between two lines."""
    return np.stack([a[..., :-1, :], b[..., :-1, :], b[..., 1:, :], a[..., 1:, :]], -2)


def _lesions(rng: Rng, quads: Quads, plants: Floats, blades: tuple[Floats, Floats, Floats], symptom: str) -> None:
    """blight: long, tapered, along the veins, tan. rust: many small round pustules. blades: midribs and both edges (B, P, 3)."""
    spots = rng.poisson(2.2 if symptom == "blight" else 12, len(plants))
    owner = np.repeat(np.arange(len(plants)), spots)
    count, points = len(owner), 6
    if not count:
        return
    long = rng.uniform(0.16, 0.45, count) if symptom == "blight" else np.full(count, 0.05)
    wide = rng.uniform(0.25, 0.5, count) if symptom == "blight" else rng.uniform(0.12, 0.22, count)
    v, centre = rng.uniform(-0.75, 0.75, (count, 1)), rng.uniform(0.08, 0.92, (count, 1))
    u = np.clip(centre + long[:, None] * np.linspace(-0.5, 0.5, points), 0, 1) * SEGMENTS
    low = np.minimum(u.astype(np.int64), SEGMENTS - 1)
    part = (u - low)[..., None]
    rib, left, right = (
        line[owner[:, None], low] * (1 - part) + line[owner[:, None], low + 1] * part for line in blades
    )
    swell = np.sin(np.linspace(0, np.pi, points)) * wide[:, None]
    rows = []
    for offset in (-swell, swell):
        place = np.clip(v + offset, -0.98, 0.98)[..., None]
        rows.append(rib + np.abs(place) * (np.where(place < 0, left, right) - rib))
    material = BLIGHT if symptom == "blight" else RUST
    quads.add(strip(*rows), plants[owner][:, None], material, rng.uniform(0.85, 1.1, (count, 1)), 0.004)


def _colours(
    codes: npt.NDArray[np.int32], site: Field, tints: Floats, weed: int
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(picture, diseased): colour by material, plant and shade."""
    green = site.green
    base = np.stack(
        [green, 0.55 * green + 0.30, 1.05 * green + 0.08, green * [0.9, 1.05, 0.8], TAN, ORANGE, YELLOW]
    ).astype(np.float32)
    material, plant, shade = (codes >> 8) & 255, codes >> 16, (codes & 255) / np.float32(128)
    colour = base[material] * np.where((material >= BLIGHT)[..., None], 1, tints[np.minimum(plant, weed)])
    return colour * shade[..., None], material >= BLIGHT


def _soil(rng: Rng, site: Field, side: int, shadow: Floats) -> Floats:
    """(side, side, 3): clods of three sizes lit from the sun's side, straw, stones, and the shadow of the plants."""
    from PIL import Image, ImageDraw

    height = 0.5 * smooth(rng, side, 7) + 0.3 * smooth(rng, side, 23) + 0.2 * smooth(rng, side, 61)
    slope = np.gradient(height, axis=1) * site.sun[0] - np.gradient(height, axis=0) * site.sun[1]
    light = 0.75 + 0.5 * height + 6.0 * slope
    ground = site.soil * np.clip(light, 0.25, 1.7)[..., None]
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.poisson(90 * site.straw)):
        at, turn, length = rng.uniform(0, side, 2), rng.uniform(0, np.pi), rng.uniform(0.03, 0.14) * side
        end = at + length * np.array([np.cos(turn), np.sin(turn)])
        pen.line([*at, *end], fill=int(rng.integers(120, 255)), width=int(rng.integers(1, 4)))
    for _ in range(rng.poisson(5)):
        (x, y), r = rng.uniform(0, side, 2), rng.uniform(0.004, 0.014) * side
        pen.ellipse([x - r, y - r, x + 1.3 * r, y + r], fill=int(rng.integers(60, 140)))
    cover = np.asarray(canvas, np.float32)[..., None] / 255
    ground = ground + cover * (STRAW - ground)
    made: Floats = ground * (1 - site.shadow * shadow)[..., None]
    return made


def _photograph(rng: Rng, site: Field, picture: Floats) -> npt.NDArray[np.uint8]:
    """Uneven light, exposure, white balance, blur and noise."""
    picture = picture * (0.85 + 0.3 * smooth(rng, len(picture), 2))[..., None]
    if site.blur > 0:
        near = (np.roll(picture, 1, 0) + np.roll(picture, -1, 0) + np.roll(picture, 1, 1) + np.roll(picture, -1, 1)) / 4
        picture = picture + np.float32(0.5 * site.blur) * (near - picture)
    picture = picture * (site.gain * np.float32(site.exposure * rng.uniform(0.9, 1.1)))
    picture = picture + np.float32(site.noise) * rng.standard_normal(picture.shape, np.float32)
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _pooled(picture: Floats) -> Floats:
    side, _, channels = picture.shape
    made: Floats = picture.reshape(side // SUPER, SUPER, side // SUPER, SUPER, channels).mean((1, 3))
    return made


def _majority(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Of each 2 x 2 samples the label that two of them share, else the first."""
    a, b, c, d = labels[::2, ::2], labels[::2, 1::2], labels[1::2, ::2], labels[1::2, 1::2]
    return np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))
