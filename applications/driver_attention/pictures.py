"""Clips as pictures: a few frames of every view, the truth and what the model says, hits and worst errors (matplotlib)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from applications.driver_attention.config import VIEWS, Config
from applications.driver_attention.pipeline import CONFLICT, NAMES, STATE, STATES, postprocess
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.report.charts import COLOURS, png

SHOWN = 6  # frames of a clip


def pictures(config: Config, outputs: Outputs, examples: Examples) -> list[tuple[bytes, str]]:
    """The surest conflict, the surest quiet clip, and the worst error of each kind, where the truth is known."""
    score = postprocess(config, outputs)["score"]
    truth = np.asarray(examples.targets)[:, CONFLICT]
    chosen: dict[int, str] = {}
    for value, sign, caption in (
        (1, 1, "A conflict that the model is sure of"),
        (1, -1, "The conflict that it misses most"),
        (0, -1, "A quiet clip that it is sure of"),
        (0, 1, "The quiet clip that it takes most for a conflict"),
    ):
        rows = np.flatnonzero(truth == value)
        if len(rows):
            chosen.setdefault(int(rows[np.argmax(sign * score[rows])]), caption)
    if not chosen:
        chosen = {0: "The first clip"}
    return [(clip(config, outputs, examples, i), f"{caption}: {told(config, outputs, examples, i)}.") for i, caption in chosen.items()]  # fmt: skip


def told(config: Config, outputs: Outputs, examples: Examples, i: int) -> str:
    columns = postprocess(config, outputs)
    truth = np.asarray(examples.targets)[i]
    said = f"conflict {columns['score'][i]:.2f}, driver {columns['state'][i]}"
    conflict = "not known" if np.isnan(truth[CONFLICT]) else ("yes" if truth[CONFLICT] else "no")
    state = "not known" if np.isnan(truth[STATE]) else STATES[int(truth[STATE])]
    return f"{examples.columns['example_id'][i]} of {examples.columns['client'][i]}; the model says {said}; conflict {conflict}, driver {state} in truth"


def clip(config: Config, outputs: Outputs, examples: Examples, i: int) -> bytes:
    frames, present = (np.asarray(examples.inputs[name][i]) for name in ("frames", "present"))
    motion = np.asarray(examples.inputs["kinematics"][i])
    times = np.arange(-frames.shape[1] + 1, 1) / config.data.rate_hz
    shown = np.unique(np.linspace(0, frames.shape[1] - 1, SHOWN).round().astype(int))
    figure = Figure(figsize=(1.75 * len(shown), 1.25 * len(VIEWS) + 1.6), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(VIEWS) + 1, len(shown), height_ratios=[*(1.0 for _ in VIEWS), 1.3])
    for row, view in enumerate(VIEWS):
        for column, t in enumerate(shown):
            axes = figure.add_subplot(grid[row, column])
            if present[row, t]:
                axes.imshow(frames[row, t], cmap="gray", vmin=0, vmax=255, aspect="auto")
            else:
                axes.text(0.5, 0.5, "no frame", ha="center", va="center", fontsize=7, transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"{times[t]:.1f} s", fontsize=8)
            if column == 0:
                axes.set_ylabel(view, fontsize=8)
    axes = figure.add_subplot(grid[len(VIEWS), :])
    curves(axes, times, motion)
    return png(figure)


def curves(axes: Any, times: npt.NDArray[np.floating], motion: npt.NDArray[np.floating]) -> None:
    for k, name in enumerate(("long_acc_mps2", "lat_acc_mps2", "yaw_rate_dps")):
        axes.plot(times, motion[:, NAMES.index(name)], color=COLOURS[k], label=name, linewidth=1.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("s before the end of the clip", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper left")
