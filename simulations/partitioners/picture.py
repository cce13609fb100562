"""A picture of a partition: how many examples of each label each client has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fl_core.learning.examples import Examples
from fl_core.report.charts import COLOURS, png
from simulations.partitioners.base import label_numbers

MOST_NAMES = 40


def picture(examples: Examples, labels: Sequence[str] = (), title: str = "") -> bytes:
    """PNG. labels: names of the classes, in order, where they are known."""
    clients, owner = np.unique(examples.columns["client"], return_inverse=True)
    numbers = label_numbers(examples)
    counts = np.zeros((int(numbers.max()) + 1, len(clients)))
    np.add.at(counts, (numbers, owner.reshape(-1)), 1)
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.4])
    top.bar(range(len(clients)), counts.sum(axis=0), color=COLOURS[0], width=0.8)
    top.set(ylabel="examples", title=title)
    top.spines[["top", "right"]].set_visible(False)
    shown = np.ma.masked_equal(counts, 0)
    image = below.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm(1, max(2.0, counts.max()))
    )
    names = list(labels) if len(labels) == len(counts) else [str(i) for i in range(len(counts))]
    below.set_yticks(range(len(names)), names)
    below.set(ylabel="label")
    if len(clients) <= MOST_NAMES:
        below.set_xticks(range(len(clients)), [str(c) for c in clients], rotation=90, fontsize=7)
    else:
        below.set(xlabel=f"{len(clients)} clients")
    figure.colorbar(image, ax=below, label="examples")
    return png(figure)
