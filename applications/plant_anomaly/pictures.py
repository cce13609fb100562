"""Photographs beside their reconstruction and heat map, and the latent space as a map (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from applications.plant_anomaly.pipeline import UNKNOWN, probability
from fl_core.report.charts import COLOURS, png

Array = npt.NDArray[Any]


def table(rows: Sequence[tuple[str, Array, Array, Array, Array]]) -> bytes:
    """(name, image (S, S, 3), reconstruction (3, S, S), heat (S, S) logits, lesions (S, S)) of each row. PNG."""
    figure = Figure(figsize=(9.4, 2.3 * len(rows) + 0.3), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for number, (places, (name, image, reconstruction, heat, lesions)) in enumerate(zip(grid, rows, strict=True)):
        made = np.clip((reconstruction.transpose(1, 2, 0) + 2) / 4, 0, 1)
        known = np.where(lesions == UNKNOWN, 0.5, lesions)
        shown = ((image, None), (made, None), (probability(heat), "inferno"), (known, "Greys_r"))
        titles = ("photograph", "reconstruction", "heat: probability of a lesion", "known lesions (grey: not known)")
        for place, (picture, colours), title in zip(places, shown, titles, strict=True):
            place.imshow(
                picture, interpolation="nearest", **({"cmap": colours, "vmin": 0, "vmax": 1} if colours else {})
            )
            place.set_xticks([])
            place.set_yticks([])
            if number == 0:
                place.set_title(title, fontsize=9)
        places[0].set_ylabel(name, fontsize=7.5)
    return png(figure)


def latent_map(latent: Array, names: Array, thresholds: Mapping[str, float]) -> bytes:
    """The whitened latent space: its two directions of most spread, and the distances of each kind. names: (N,) of each point."""
    figure = Figure(figsize=(9.4, 4.2), dpi=110, layout="constrained")
    places, bars = figure.subplots(1, 2)
    centred = latent - latent.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ axes[:2].T
    distance = np.sqrt((latent.astype(np.float64) ** 2).mean(1))
    bins = np.geomspace(max(distance.min(), 1e-2), distance.max() * 1.01, 40)
    for k, name in enumerate(np.unique(names)):
        mine, colour = names == name, COLOURS[k % len(COLOURS)]
        places.scatter(*flat[mine].T, s=7, color=colour, alpha=0.6, label=f"{name} ({mine.sum()})", linewidths=0)
        bars.hist(distance[mine], bins, histtype="step", color=colour, density=True, label=str(name))
    for name, value in thresholds.items():
        bars.axvline(value, color="#000000", linestyle="--", linewidth=1)
        bars.annotate(
            name, (value, 0.97), xycoords=("data", "axes fraction"), fontsize=7.5, rotation=90, va="top", ha="right"
        )
    places.set(xlabel="first direction", ylabel="second direction", title="latent space, whitened by healthy plants")
    bars.set_xscale("log")
    bars.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bars.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    bars.xaxis.set_minor_formatter(NullFormatter())
    bars.set(xlabel="distance (about 1 = healthy)", ylabel="density", title="distances")
    places.legend(frameon=False, fontsize=7.5)
    return png(figure)
