"""Images with their labels and predictions, and the confusion of classes (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fl_core.report.charts import png

Array = npt.NDArray[Any]


def gallery(images: Array, notes: Sequence[str], columns: int) -> bytes:
    """(N, S, S, 3) with a note above each. PNG."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.75 * columns, 2.15 * rows), dpi=110, layout="constrained")
    for k, place in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        place.set_axis_off()
        if k < len(images):
            place.imshow(images[k], interpolation="nearest")
            place.set_title(notes[k], fontsize=6.5)
    return png(figure)


def confusion(table: Array, classes: Sequence[str]) -> bytes:
    """Counts, coloured by their share of the row. PNG."""
    figure = Figure(figsize=(1.6 + 0.95 * len(classes), 1.2 + 0.8 * len(classes)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        axes.text(
            column,
            row,
            str(count),
            ha="center",
            va="center",
            fontsize=9,
            color="white" if share[row, column] > 0.5 else "#1b2733",
        )
    axes.set_xticks(range(len(classes)), classes, rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(xlabel="taken for", ylabel="label")
    return png(figure)
