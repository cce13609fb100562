"""Photographs beside their truth, what was found, and where that is wrong (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from applications.plant_segmentation.pipeline import UNLABELLED
from fl_core.report.charts import png

Array = npt.NDArray[Any]
TURN = 0.618034  # of the colour circle from one plant's colour to the next
LEGENDS = {
    "instances": "orange = missed, blue = ground taken for plant, yellow = given to another plant",
    "semantic": "orange = missed, blue = marked where there is nothing",
}
MISSED, WRONG, ELSEWHERE = (0.84, 0.37, 0.0), (0.0, 0.45, 0.70), (0.94, 0.89, 0.26)


def coloured(labels: Array, image: Array) -> Array:
    """(H, W, 3) in [0, 1]: each plant in a colour of its own over the grey photograph; unlabelled pixels white."""
    from matplotlib.colors import hsv_to_rgb

    grey = np.repeat(image.mean(-1, keepdims=True) / 255, 3, -1) * 0.55
    hue = (labels * TURN) % 1.0
    colour = hsv_to_rgb(np.stack([hue, np.full(hue.shape, 0.75), np.full(hue.shape, 0.95)], -1))
    made = np.where((labels > 0)[..., None], colour, grey)
    return np.where((labels == UNLABELLED)[..., None], 1.0, made)


def errors(truth: Array, found: Array, image: Array) -> Array:
    """Missed plant, plant where there is ground, and pixels given to another plant than the one that the instance overlaps most."""
    made = np.repeat(image.mean(-1, keepdims=True) / 255, 3, -1) * 0.55
    known = truth != UNLABELLED
    made[known & (truth > 0) & (found == 0)] = MISSED
    made[known & (truth == 0) & (found > 0)] = WRONG
    for number in np.unique(found[found > 0]):
        inside = (found == number) & known & (truth > 0)
        if inside.any():
            names, count = np.unique(truth[inside], return_counts=True)
            made[inside & (truth != names[count.argmax()])] = ELSEWHERE
    return made


def table(rows: Sequence[tuple[str, Array, Array, Array]], task: str = "instances") -> bytes:
    """(name, image (H, W, 3), truth, found) of each row: photograph, truth, prediction, error. PNG. task: as ``model.task``."""
    figure = Figure(figsize=(9.2, 2.35 * len(rows) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for number, (places, (name, image, truth, found)) in enumerate(zip(grid, rows, strict=True)):
        shown = (image, coloured(truth, image), coloured(found, image), errors(truth, found, image))
        for place, picture, title in zip(places, shown, ("photograph", "truth", "prediction", "error"), strict=True):
            place.imshow(picture, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            if number == 0:
                place.set_title(title, fontsize=9)
        places[0].set_ylabel(name, fontsize=8)
    figure.supxlabel(f"error: {LEGENDS[task]}", fontsize=8)
    return png(figure)
