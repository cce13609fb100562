"""Random design problems of several kinds, one kind a company; lengths are fractions of the box, so that one problem can be
laid on any grid. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from applications.topology_optimisation.problems import Problem, box, checked

Corner = tuple[float, float, float]
FAMILIES = ("cantilever", "bridge", "bracket", "column")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """supports: boxes whose nodes are held; loads: (low corner, high corner, whole force on the nodes between them)."""

    family: str
    supports: tuple[tuple[Corner, Corner], ...]
    loads: tuple[tuple[Corner, Corner, Corner], ...]
    volume_fraction: float

    def problem(self, size: int) -> Problem:
        """On a cube of ``size`` elements a side."""
        shape = (size, size, size)
        nodes = (3, *(n + 1 for n in shape))
        force, fixed = np.zeros(nodes, np.float32), np.zeros(nodes, bool)
        for low, high in self.supports:
            fixed[(slice(None), *box(shape, low, high))] = True
        for low, high, whole in self.loads:
            where = box(shape, low, high)
            count = force[(0, *where)].size
            for axis, value in enumerate(whole):
                force[(axis, *where)] += value / count
        problem = Problem(shape=shape, force=force, fixed=fixed, volume_fraction=self.volume_fraction)
        return checked(problem, f"generated {self.family}")


def draw(family: str, rng: np.random.Generator) -> Spec:
    """One random problem; the wall is at x = 0, the ground at z = 0, loads point downwards with a tilt."""
    supports, low, high = _PLACES[family](rng)
    tilt = rng.normal(0, 0.35, 2)
    force = np.array([tilt[0], tilt[1], -1.0])
    if family == "column":
        angle = rng.uniform(0, 2 * np.pi)
        force = np.array([np.cos(angle), np.sin(angle), -rng.uniform(0, 1)])
    force /= np.linalg.norm(force)
    return Spec(
        family=family,
        supports=supports,
        loads=((_corner(low), _corner(high), _corner(force)),),
        volume_fraction=round(float(rng.uniform(0.25, 0.45)), 3),
    )


def _corner(values: Any) -> Corner:
    x, y, z = (round(float(v), 4) for v in values)
    return x, y, z


def _patch(rng: np.random.Generator, centre: tuple[float, float], half: tuple[float, float]) -> tuple[Any, Any]:
    at = np.array([rng.uniform(*centre), rng.uniform(*centre)])
    size = rng.uniform(*half, 2)
    return np.clip(at - size, 0, 1), np.clip(at + size, 0, 1)


def _cantilever(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    width = rng.uniform(0.2, 0.5)
    low, high = _patch(rng, (0.15, 0.85), (0.04, 0.15))
    return (((0.0, round(0.5 - width, 4), 0.0), (0.0, round(0.5 + width, 4), 1.0)),), (1, *low), (1, *high)


def _bridge(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    low, high = _patch(rng, (0.25, 0.75), (0.08, 0.25))
    return _pads(round(float(rng.uniform(0.1, 0.2)), 4)), (*low, 1), (*high, 1)


def _bracket(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    from_z = rng.uniform(0, 0.5)
    wall = ((0.0, 0.0, round(from_z, 4)), (0.0, 1.0, round(from_z + rng.uniform(0.35, 0.5), 4)))
    middle, half, far = rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.3), rng.uniform(0.7, 1.0)
    low, high = (far - 0.05, middle - half, 1), (min(1.0, far + 0.05), middle + half, 1)
    return (wall,), low, high


def _column(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    low, high = _patch(rng, (0.25, 0.75), (0.05, 0.15))
    return _pads(round(float(rng.uniform(0.15, 0.35)), 4)), (*low, 1), (*high, 1)


def _pads(side: float) -> tuple[Any, ...]:
    """The four corners of the ground."""
    ends = ((0.0, side), (round(1 - side, 4), 1.0))
    return tuple(((x[0], y[0], 0.0), (x[1], y[1], 0.0)) for x in ends for y in ends)


_PLACES = {"cantilever": _cantilever, "bridge": _bridge, "bracket": _bracket, "column": _column}
