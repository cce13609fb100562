"""Windows as pictures: what the sensors read over the 8 s, the truth and what the model says, hits and worst errors (matplotlib)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from applications.driver_conflict import pipeline
from applications.driver_conflict.config import Config
from applications.driver_conflict.pipeline import LABELS, RATE_HZ, index, postprocess
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.report.charts import COLOURS, png

Array = npt.NDArray[Any]
PANELS = {
    "speed, mph": ("speed_vehicle_mph", "speed_gps_mph"),
    "acceleration, g": ("long_acc_g", "lat_acc_g"),
    "turning, deg/s": ("yaw_rate_dps",),
    "range, ft": ("fwd_range_ft", "rear_range_ft"),
    "range rate, ft/s": ("fwd_range_rate_ftps", "rear_range_rate_ftps"),
}


def pictures(config: Config, outputs: Outputs, examples: Examples) -> list[tuple[bytes, str]]:
    """The surest conflict, the conflict missed most, the surest quiet window, the worst false alarm; scores of both classes."""
    columns = postprocess(config, outputs)
    score, truth = columns["score"], np.asarray(examples.targets) > 0
    chosen: dict[int, str] = {}
    for happened, sign, caption in (
        (True, 1, "A conflict that the model is sure of"),
        (True, -1, "The conflict that it misses most"),
        (False, -1, "A quiet window that it is sure of"),
        (False, 1, "The worst false alarm"),
    ):
        rows = np.flatnonzero(truth == happened)
        if len(rows):
            chosen.setdefault(int(rows[np.argmax(sign * score[rows])]), caption)
    found = [(histogram(score, truth), "Scores of the windows with and without a conflict.")]
    for i, caption in chosen.items():
        said = f"conflict {score[i]:.2f}, {columns['incident'][i]} if so"
        told = f"{examples.columns['example_id'][i]} of {examples.columns['client'][i]}; the model says {said}; in truth {LABELS[int(examples.targets[i])]}"
        found.append(
            (window(np.asarray(examples.inputs["window"][i])), f"{caption}: {told}. The judged 3 s are shaded.")
        )
    return found


def histogram(score: Array, truth: Array) -> bytes:
    figure = Figure(figsize=(7, 2.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, 41).tolist()
    for happened, colour, name in ((False, COLOURS[0], "no conflict"), (True, COLOURS[1], "conflict")):
        mine = score[truth == happened]
        share = np.full(len(mine), 1 / max(1, len(mine)))
        axes.hist(mine, bins=edges, weights=share, color=colour, alpha=0.6, label=f"{name} ({len(mine):,})")
    axes.set(xlabel="score", ylabel="share of the windows", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def window(rows: Array) -> bytes:
    """(T, C) readings, as they are; what is missing leaves a gap."""
    figure = Figure(figsize=(9, 5.6), dpi=110, layout="constrained")
    grid = figure.subplots(len(PANELS), 1, sharex=True)
    times = (np.arange(len(rows)) - len(rows) + 1) / RATE_HZ
    clean = pipeline.clean(rows)
    for axes, (title, names) in zip(grid, PANELS.items(), strict=True):
        axes.axvspan(-(pipeline.WINDOW_ROWS - 1) / RATE_HZ, 0, color="#999999", alpha=0.15, lw=0)
        for k, name in enumerate(names):
            axes.plot(times, clean[:, index(name)], color=COLOURS[k], linewidth=1.2, label=name)
        axes.set_ylabel(title, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6, ncols=2, loc="upper left")
    grid[-1].set_xlabel("s before the end of the window", fontsize=8)
    return png(figure)
