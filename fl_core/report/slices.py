"""Three orthogonal slices of volumes side by side: what went in, what is true, what was predicted, where it is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fl_core.report.charts import COLOURS, png

Array = npt.NDArray[Any]
MORE = ("#F0E442", "#999999", "#7F3C8D", "#A5AA99")  # beyond the seven of the palette


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One column. volume: (a, b, c); kind: ``signed`` (about zero), ``labels`` (class numbers), ``mask`` (true = marked),
    ``share`` (0 to 1)."""

    volume: Array
    kind: str


def orthogonal_slices(
    panels: Mapping[str, Panel],
    *,
    at: tuple[int, int, int],
    axes: tuple[str, str, str],
    classes: Sequence[str] = (),
) -> bytes:
    """A row for each axis, cut at ``at``; a column for each panel. The last axis points down. PNG."""
    shape = next(iter(panels.values())).volume.shape
    heights = [shape[2], shape[2], shape[1]]
    figure = Figure(
        figsize=(2.3 * len(panels) + 0.6, 2.4 * sum(heights) / max(shape) + 0.8), dpi=110, layout="constrained"
    )
    grid = figure.subplots(3, len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for column, (name, panel) in enumerate(panels.items()):
        for row in range(3):
            a = grid[row][column]
            a.imshow(np.asarray(np.take(panel.volume, at[row], axis=row)).T, **_look(panel, len(classes)))
            a.set_xticks([])
            a.set_yticks([])
            if row == 0:
                a.set_title(name, fontsize=9)
            if column == 0:
                others = [axes[i] for i in range(3) if i != row]
                a.set_ylabel(f"{axes[row]} {at[row]}\n{others[1]}", fontsize=8)
                a.set_xlabel(others[0], fontsize=8, labelpad=1)
    if classes:
        marks = [Patch(color=colour, label=name) for name, colour in zip(classes, _colours(len(classes)), strict=False)]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 8), frameon=False, fontsize=8)
    return png(figure)


def _colours(count: int) -> list[str]:
    palette = (*COLOURS, *MORE)
    return [palette[k % len(palette)] for k in range(max(count, 1))]


def _look(panel: Panel, classes: int) -> dict[str, Any]:
    common: dict[str, Any] = {"interpolation": "nearest", "aspect": "auto"}
    if panel.kind == "labels":
        bounds = np.arange(-0.5, max(classes, 1))
        shown = ListedColormap(_colours(classes), name="classes").with_extremes(over="#ffffff")
        return {**common, "cmap": shown, "norm": BoundaryNorm(bounds, max(classes, 1))}
    if panel.kind == "mask":
        return {**common, "cmap": ListedColormap(["#f4f4f4", "#222222"], name="mask"), "vmin": 0, "vmax": 1}
    if panel.kind == "share":
        return {**common, "cmap": "Greys", "vmin": 0, "vmax": 1}
    limit = float(np.percentile(np.abs(panel.volume), 99)) or 1.0
    return {**common, "cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
