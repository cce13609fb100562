"""Designs as pictures: three orthogonal slices, and the structure as a shaded isosurface of its densities (matplotlib)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]

from applications.topology_optimisation import pipeline
from fl_core.report.charts import png

Field = npt.NDArray[Any]
LIGHT = np.array([0.35, -0.75, 0.56])
COLOUR = np.array([0.22, 0.50, 0.72])


@dataclass(frozen=True, kw_only=True)
class Column:
    """field: (n, n, n); through: not the middle plane but, of all along the axis, what is farthest from 0."""

    field: Field
    colours: str
    least: float
    most: float
    through: bool = False

    def plane(self, axis: int) -> Field:
        made: Field = np.take(self.field, self.field.shape[axis] // 2, axis)
        if self.through:
            high, low = self.field.max(axis=axis), self.field.min(axis=axis)
            made = np.where(high >= -low, high, low)
        return made


def slices(columns: dict[str, Column], title: str) -> bytes:
    """One column each; rows are the planes across x, y and z."""
    figure = Figure(figsize=(2.3 * len(columns), 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(3, len(columns), squeeze=False)
    for column, (name, one) in enumerate(columns.items()):
        for row, (axis, label) in enumerate((("x", "y, z"), ("y", "x, z"), ("z", "x, y"))):
            place = axes[row, column]
            shown = place.imshow(one.plane(row).T, origin="lower", cmap=one.colours, vmin=one.least, vmax=one.most)
            place.set_xticks([])
            place.set_yticks([])
            if column == 0:
                place.set_ylabel(f"middle of {axis} ({label})", fontsize=8)
            if row == 0:
                place.set_title(name, fontsize=9)
            if row == 2:
                figure.colorbar(shown, ax=place, orientation="horizontal", fraction=0.05)
    figure.suptitle(title, fontsize=10)
    return png(figure)


def structures(designs: dict[str, Field], title: str) -> bytes:
    """One view of each structure, from the same side."""
    figure = Figure(figsize=(3.6 * len(designs), 3.9), dpi=110, layout="constrained")
    for number, (name, density) in enumerate(designs.items()):
        axes = figure.add_subplot(1, len(designs), number + 1, projection="3d")
        faces, normals = surface(density)
        shade = 0.35 + 0.65 * np.clip(normals @ LIGHT, 0, 1)[:, None]
        axes.add_collection3d(Poly3DCollection(faces, facecolors=np.clip(shade * COLOUR * 1.25, 0, 1), linewidths=0))
        n = max(density.shape)
        axes.set(xlim=(0, n), ylim=(0, n), zlim=(0, n))
        axes.set_box_aspect((1, 1, 1))
        axes.view_init(elev=22, azim=-58)
        axes.tick_params(labelsize=6)
        axes.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return png(figure)


def surface(density: Field) -> tuple[Field, Field]:
    """(M, 3, 3) triangles where the density passes ``pipeline.SOLID``, and (M, 3) outward normals: marching tetrahedra
    (Doi & Koide 1991) over the cells' centres, with a layer of void around them."""
    field = np.pad(np.asarray(density, np.float64), 1) - pipeline.SOLID
    cube = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    tetrahedra = [(0, 1, 3, 7), (0, 1, 5, 7), (0, 2, 3, 7), (0, 2, 6, 7), (0, 4, 5, 7), (0, 4, 6, 7)]
    shape = tuple(n - 1 for n in field.shape)
    origin = np.indices(shape).reshape(3, -1).T
    values = np.stack([field[tuple(slice(c, c + n) for c, n in zip(o, shape, strict=True))].ravel() for o in cube], 1)
    crossed = (values > 0).any(axis=1) & (values <= 0).any(axis=1)
    origin, values = origin[crossed], values[crossed]
    triangles, directions = [], []
    for corners in tetrahedra:
        v, at = values[:, corners], origin[:, None, :] + cube[list(corners)]
        inside = v > 0
        for pattern in range(1, 15):
            mine = np.flatnonzero((inside * (1, 2, 4, 8)).sum(axis=1) == pattern)
            if not len(mine):
                continue
            ins = [c for c in range(4) if pattern >> c & 1]
            outs = [c for c in range(4) if c not in ins]
            edge = {(a, b): _cross(at[mine, a], at[mine, b], v[mine, a], v[mine, b]) for a in ins for b in outs}
            outward = at[mine][:, outs].mean(axis=1) - at[mine][:, ins].mean(axis=1)
            points = [edge[a, b] for a in ins for b in outs]
            if len(ins) == 2:  # a quadrilateral, its corners in turn
                points = [points[0], points[1], points[3], points[2]]
                parts = [(0, 1, 2), (0, 2, 3)]
            else:
                parts = [(0, 1, 2)]
            for part in parts:
                triangles.append(np.stack([points[p] for p in part], axis=1))
                directions.append(outward)
    if not triangles:
        return np.zeros((0, 3, 3)), np.zeros((0, 3))
    faces, outward = np.concatenate(triangles) - 0.5, np.concatenate(directions)
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = normals / np.where(length > 0, length, 1)
    normals *= np.sign((normals * outward).sum(axis=1, keepdims=True))
    return faces, normals


def _cross(a: Field, b: Field, value_a: Field, value_b: Field) -> Field:
    share = (value_a / (value_a - value_b))[:, None]
    result: Field = a + share * (b - a)
    return result
