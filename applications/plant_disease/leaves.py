"""Pictures of leaves made by rule: outline, veins and lesions in the leaf's own coordinates, then scene and camera.

Coordinates: u runs along the midrib and v across it, both in units of the picture's side, 0 at its centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
Rng = np.random.Generator
SYMPTOMS = ("cigar", "pustules", "stripes", "none")
BACKDROPS = ("soil", "foliage", "sky", "grey", "black")
PLAIN = ("grey", "black")
TABLE = 64  # cells of lesions repeat after so many in each direction, far outside the picture


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a place and its camera share. green: the cultivar's colour; gain: white balance; the rest in parts of 1."""

    backdrop: str
    green: Floats
    gain: Floats
    exposure: float
    noise: float
    blur: float
    closeness: float
    decay: float

    @classmethod
    def draw(cls, rng: Rng) -> Site:
        green = np.array([0.30, 0.50, 0.22]) + rng.normal(0, [0.06, 0.05, 0.05])
        return cls(
            backdrop=str(rng.choice(BACKDROPS)),
            green=green.clip(0.08, 0.75).astype(np.float32),
            gain=np.exp(rng.normal(0, [0.10, 0.04, 0.12])).astype(np.float32),
            exposure=float(rng.uniform(0.7, 1.35)),
            noise=float(rng.uniform(0.005, 0.03)),
            blur=float(rng.uniform(0.0, 0.7)),
            closeness=float(rng.uniform(0.8, 1.3)),
            decay=float(rng.uniform(0.0, 0.5)),
        )


def smooth(rng: Rng, side: int, cells: int, channels: int = 1) -> Floats:
    """(side, side, channels): a blend of random values in [0, 1), ``cells`` a side."""
    values = rng.random((cells + 1, cells + 1, channels), np.float32)
    place = np.linspace(0, cells, side, dtype=np.float32)
    weight = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells + 1, dtype=np.float32)))
    blend: Floats = np.einsum("yi,ijc,xj->yxc", weight, values, weight, optimize=True)
    return blend


def soft(distance: Floats, width: float) -> Floats:
    """1 where ``distance`` is well below 0, 0 well above, a ramp of ``width`` between."""
    ramp: Floats = np.clip(0.5 - distance / width, 0, 1)
    return ramp


def mix(picture: Floats, colour: Floats, amount: Floats) -> Floats:
    mixed: Floats = picture + amount[..., None] * (colour - picture)
    return mixed


def draw(plant: Rng, shot: Rng, site: Site, symptom: str, variant: int, side: int) -> npt.NDArray[np.uint8]:
    """(side, side, 3). ``plant`` decides the leaf and its lesions, ``shot`` the pose and the light."""
    u, v, pixel = _frame(plant, shot, site, side)
    width = float(plant.uniform(0.26, 0.5)) * site.closeness
    edge = width * _outline(plant, u)
    inside = soft(np.abs(v) - edge, pixel)
    leaf = _blade(plant, site, u, v, edge, side)
    if symptom != "none":
        draw_lesions = {"cigar": _cigars, "pustules": _pustules, "stripes": _stripes}[symptom]
        leaf = draw_lesions(plant, leaf, u, v, edge, pixel, variant)
    leaf = _blemishes(plant, site, leaf, u, v, edge, pixel, side)
    light = 0.75 + 0.5 * smooth(shot, side, 2)
    return _camera(shot, site, mix(_backdrop(shot, site, side), leaf * light, inside), side)


def _frame(plant: Rng, shot: Rng, site: Site, side: int) -> tuple[Floats, Floats, float]:
    """(u, v, size of a pixel): a turned, shifted and slightly bent frame."""
    angle, shift = shot.uniform(0, 2 * np.pi), shot.uniform(-0.12, 0.12, 2)
    zoom = float(shot.uniform(0.85, 1.15))
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    y, x = zoom * axis[:, None] + np.float32(shift[0]), zoom * axis[None, :] + np.float32(shift[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    return u, (v + np.float32(plant.uniform(-0.35, 0.35)) * u * u), zoom / side


def _outline(rng: Rng, u: Floats) -> Floats:
    """Half width, relative: a strip that may end in a tip, with a wavy margin."""
    tip = rng.uniform(0.35, 1.4)
    ends = np.sqrt(np.clip((tip - u) / (tip + 0.5), 0, 1))
    waves = 1 + 0.05 * np.sin(u * rng.uniform(8, 25) + rng.uniform(0, 6)) * rng.uniform(0, 1.5)
    return (ends * waves).astype(np.float32)


def _blade(rng: Rng, site: Site, u: Floats, v: Floats, edge: Floats, side: int) -> Floats:
    tone = site.green * np.float32(rng.uniform(0.8, 1.2)) + rng.normal(0, 0.02, 3).astype(np.float32)
    patches = smooth(rng, side, 3)
    leaf = tone * (0.85 + 0.3 * smooth(rng, side, 5)) + patches * np.array([0.10, 0.06, -0.02], np.float32)
    veins = 1 + 0.07 * np.sin(v * np.float32(rng.uniform(150, 320)))
    fold = 1 + 0.12 * np.tanh(v * 12) * np.float32(rng.uniform(-1, 1))
    leaf = leaf * (veins * fold)[..., None]
    rib = soft(np.abs(v) - np.float32(rng.uniform(0.008, 0.02)) * (0.4 + edge), 0.012)
    return mix(leaf, np.array([0.72, 0.80, 0.58], np.float32), 0.75 * rib)


def _cells(rng: Rng, u: Floats, v: Floats, long: float, wide: float, fill: float) -> tuple[Floats, Floats, Floats]:
    """Distances (along, across), in cells from the centre of the nearest lesion, and its strength (0 = there is none).

    One lesion a cell at most; rows of cells are shifted against one another.
    """
    table = rng.random((5, TABLE, TABLE), np.float32)
    row = np.floor(v / wide).astype(np.int64)
    along = u / np.float32(long) + table[0][row % TABLE, 0]
    column = np.floor(along).astype(np.int64)
    key = (row % TABLE, column % TABLE)
    clumps = 0.5 + 0.5 * np.sin(u * rng.uniform(4, 9) + rng.uniform(0, 6)) * np.sin(v * rng.uniform(4, 9))
    there = table[1][key] < fill * 2 * clumps
    across = v / np.float32(wide) - row - (0.35 + 0.3 * table[2][key])
    along = along - column - (0.35 + 0.3 * table[3][key])
    return along.astype(np.float32), across.astype(np.float32), np.where(there, 0.4 + 0.6 * table[4][key], 0)


def _cigars(rng: Rng, leaf: Floats, u: Floats, v: Floats, edge: Floats, pixel: float, variant: int) -> Floats:
    """Northern leaf blight: few long lesions, tapered to both ends, grey-green to tan with a darker rim."""
    for _ in range(int(rng.integers(1, 5))):
        long, wide = rng.uniform(0.10, 0.34), rng.uniform(0.018, 0.05) * (1 + variant)
        at_u, at_v = rng.uniform(-0.4, 0.4), rng.uniform(-0.8, 0.8) * float(edge.mean())
        reach = ((u - at_u) / long) ** 2
        distance = np.abs(v - at_v - 0.2 * wide * np.sin(u * 40)) - wide * (1 - reach)
        leaf = _spot(rng, leaf, np.where(reach < 1, distance, wide), pixel, tan(rng), rim=0.5)
    return leaf


def _pustules(rng: Rng, leaf: Floats, u: Floats, v: Floats, edge: Floats, pixel: float, variant: int) -> Floats:
    """Common rust: many small round to oval pustules, cinnamon to dark brown, in a pale halo."""
    cell = rng.uniform(0.035, 0.06) * (1 + variant)
    along, across, strength = _cells(rng, u, v, cell * 1.3, cell, rng.uniform(0.2, 0.9))
    radius = np.sqrt((1.3 * along) ** 2 + across**2) * cell
    size = (0.12 + 0.20 * strength) * cell
    leaf = mix(
        leaf, np.array([0.66, 0.64, 0.32], np.float32), 0.5 * soft(radius - 1.7 * size, cell / 3) * (strength > 0)
    )
    brown = np.array([0.52, 0.27, 0.10], np.float32) * np.float32(rng.uniform(0.7, 1.3))
    return mix(leaf, brown, 0.95 * soft(radius - size, pixel) * (strength > 0))


def _stripes(rng: Rng, leaf: Floats, u: Floats, v: Floats, edge: Floats, pixel: float, variant: int) -> Floats:
    """Gray leaf spot: rectangular lesions with blunt ends, bounded by the veins, grey to tan."""
    wide, long = rng.uniform(0.028, 0.05) * (1 + variant), rng.uniform(0.10, 0.24)
    along, across, strength = _cells(rng, u, v, long, wide, rng.uniform(0.15, 0.6))
    distance = np.maximum((np.abs(along) - 0.35 * strength) * long, (np.abs(across) - 0.32) * wide)
    return _spot(rng, leaf, np.where(strength > 0, distance, wide), pixel, tan(rng), rim=0.3)


def tan(rng: Rng) -> Floats:
    """The colour of dead leaf tissue, the same for every disease: only the shape tells them apart."""
    return (np.array([0.68, 0.60, 0.44]) * rng.uniform(0.75, 1.2) + rng.normal(0, 0.04, 3)).astype(np.float32)


def _spot(rng: Rng, leaf: Floats, distance: Floats, pixel: float, colour: Floats, rim: float) -> Floats:
    leaf = mix(leaf, colour * np.float32(0.6), np.float32(rim) * soft(distance - 1.2 * pixel, 2 * pixel))
    return mix(leaf, colour, np.float32(rng.uniform(0.75, 0.95)) * soft(distance, 1.5 * pixel))


def _blemishes(
    rng: Rng, site: Site, leaf: Floats, u: Floats, v: Floats, edge: Floats, pixel: float, side: int
) -> Floats:
    """What any leaf may have: a dead margin, torn or dusty patches, a rust-coloured splash of soil."""
    if rng.random() < site.decay:
        ragged = 0.05 * smooth(rng, side, 8)[..., 0] * rng.uniform(0.3, 2)
        leaf = mix(leaf, tan(rng), 0.9 * soft(edge - np.abs(v) - ragged, 3 * pixel))
    for colour in (tan(rng), np.array([0.50, 0.30, 0.14], np.float32)):
        if rng.random() < 0.35:
            blot = smooth(rng, side, int(rng.integers(4, 12)))[..., 0]
            leaf = mix(leaf, colour, 0.8 * soft(np.float32(rng.uniform(0.85, 0.95)) - blot, 0.04))
    return leaf


def _backdrop(rng: Rng, site: Site, side: int) -> Floats:
    rough = smooth(rng, side, 4) * 0.6 + smooth(rng, side, 16) * 0.4
    if site.backdrop == "black":
        return 0.03 * rough + np.zeros((side, side, 3), np.float32)
    if site.backdrop == "grey":
        return np.array([0.52, 0.50, 0.55], np.float32) * (0.8 + 0.3 * smooth(rng, side, 2))
    if site.backdrop == "sky":
        return np.array([0.62, 0.74, 0.90], np.float32) * (0.8 + 0.35 * smooth(rng, side, 3))
    grain = rng.random((side, side, 1), np.float32)
    soil = np.array([0.42, 0.32, 0.22], np.float32) * (0.4 + 0.8 * rough + 0.3 * grain)
    if site.backdrop == "soil":
        return soil
    axis = np.arange(side, dtype=np.float32) / side
    for _ in range(4):
        angle, at = rng.uniform(0, np.pi), rng.uniform(-0.2, 1.0)
        across = np.float32(np.cos(angle)) * axis[:, None] + np.float32(np.sin(angle)) * axis[None, :] - np.float32(at)
        tone = site.green * np.float32(rng.uniform(0.4, 1.1))
        soil = mix(soil, tone, soft(np.abs(across) - np.float32(rng.uniform(0.05, 0.15)), 0.03))
    return soil


def _camera(rng: Rng, site: Site, picture: Floats, side: int) -> npt.NDArray[np.uint8]:
    """Blur, exposure, white balance and noise."""
    if site.blur > 0:
        near = (np.roll(picture, 1, 0) + np.roll(picture, -1, 0) + np.roll(picture, 1, 1) + np.roll(picture, -1, 1)) / 4
        picture = picture + np.float32(0.6 * site.blur) * (near - picture)
    exposure = np.float32(site.exposure * rng.uniform(0.8, 1.2))
    picture = picture * (site.gain * exposure) + np.float32(site.noise) * rng.standard_normal(picture.shape, np.float32)
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)
