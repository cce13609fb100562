"""Design problems: a box of elements, where it is held, what loads it, and how much of it may be material. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import DataError

LOAD_CASES = "one static load case of forces at nodes is supported"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """force, fixed: (dims, nodes...) with one node more than elements on each axis; fixed is bool."""

    shape: tuple[int, ...]
    force: npt.NDArray[np.float32]
    fixed: npt.NDArray[np.bool_]
    volume_fraction: float


def checked(problem: Problem, origin: str) -> Problem:
    """Raises DataError naming ``origin`` and the array and node at fault where the problem cannot be solved."""
    dims = len(problem.shape)
    nodes = (dims, *(n + 1 for n in problem.shape))
    if dims not in (2, 3) or min(problem.shape, default=0) < 2:
        raise DataError(
            f"{origin}: a grid of {list(problem.shape)} elements; two or three axes of at least 2 are needed"
        )
    for name, array, kinds in (("force", problem.force, "f"), ("fixed", problem.fixed, "b")):
        if array.ndim == dims + 2:
            raise DataError(f"{origin}: {name} holds {len(array)} load cases", remedy=LOAD_CASES)
        if array.shape != nodes or array.dtype.kind not in kinds:
            raise DataError(f"{origin}: {name} is {array.dtype}{list(array.shape)}, expected {kinds} {list(nodes)}")
    if (bad := first_cell(~np.isfinite(problem.force))) is not None:
        raise DataError(f"{origin}: force is not finite at component {bad[0]} of node {bad[1:]}")
    if not 0.01 <= problem.volume_fraction <= 0.99:
        raise DataError(f"{origin}: volume_fraction is {problem.volume_fraction}, expected 0.01 to 0.99")
    if not np.any(problem.force[~problem.fixed]):
        raise DataError(f"{origin}: nothing loads the free nodes", remedy=LOAD_CASES)
    if rank(problem.fixed) < (3 if dims == 2 else 6):
        raise DataError(
            f"{origin}: the supports let the whole body move", remedy="hold it against every translation and rotation"
        )
    return problem


def rank(fixed: npt.NDArray[np.bool_]) -> int:
    """How many of the rigid motions the held degrees of freedom prevent."""
    dims = fixed.ndim - 1
    component, *where = np.nonzero(fixed)
    if not len(component):
        return 0
    at = np.stack(where, axis=1).astype(np.float64)
    at = (at - at.mean(axis=0)) / max(fixed.shape)
    columns = [(component == a).astype(np.float64) for a in range(dims)]
    for a in range(dims):
        for b in range(a):
            columns.append((component == a) * at[:, b] - (component == b) * at[:, a])
    motions = np.stack(columns)
    return int(np.linalg.matrix_rank(motions @ motions.T, tol=1e-8 * len(component)))


def first_cell(bad: npt.NDArray[np.bool_]) -> tuple[int, ...] | None:
    """The first place at which ``bad`` is true."""
    if not bad.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))


def box(shape: tuple[int, ...], low: Any, high: Any) -> tuple[Any, ...]:
    """The nodes between two corners given as fractions of the sides, the ends included; at least one on each axis."""
    found = []
    for n, a, b in zip(shape, low, high, strict=True):
        first = int(np.floor(min(a, b) * n + 0.5))
        last = int(np.floor(max(a, b) * n + 0.5))
        found.append(slice(max(0, min(first, n)), max(0, min(last, n)) + 1))
    return tuple(found)


def mbb_beam(shape: tuple[int, int], volume_fraction: float = 0.5) -> Problem:
    """The right half of the Messerschmitt-Bölkow-Blohm beam: symmetric at the left, a roller at the lower right corner."""
    nodes = (2, *(n + 1 for n in shape))
    force, fixed = np.zeros(nodes, np.float32), np.zeros(nodes, bool)
    fixed[0, 0, :] = True
    fixed[1, -1, -1] = True
    force[1, 0, 0] = -1.0
    return Problem(shape=shape, force=force, fixed=fixed, volume_fraction=volume_fraction)


def cantilever(shape: tuple[int, ...], volume_fraction: float) -> Problem:
    """Held at the first face of the first axis, loaded along the lower edge of the opposite face (3-D: Liu & Tovar 2014)."""
    nodes = (len(shape), *(n + 1 for n in shape))
    force, fixed = np.zeros(nodes, np.float32), np.zeros(nodes, bool)
    fixed[:, 0] = True
    force[1, -1, 0] = -1.0
    return Problem(shape=shape, force=force, fixed=fixed, volume_fraction=volume_fraction)
