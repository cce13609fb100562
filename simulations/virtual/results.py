"""What a federation on a virtual clock came to: time to a target, bytes for each client, and a picture of both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fl_core.report.charts import COLOURS, png
from fl_server.history import RoundRecord


def seconds(history: Sequence[RoundRecord]) -> list[float]:
    """The time at the end of each round."""
    return list(accumulate(record.seconds for record in history))


def scores(history: Sequence[RoundRecord], metric: str) -> list[float | None]:
    return [(record.held_out or record.evaluation).get(metric) for record in history]


def time_to(history: Sequence[RoundRecord], metric: str, target: float, *, higher_is_better: bool) -> float | None:
    """Seconds until the metric of some round first reaches the target; None = it never does."""
    for time, score in zip(seconds(history), scores(history, metric), strict=True):
        if score is not None and (score >= target if higher_is_better else score <= target):
            return time
    return None


def traffic(history: Sequence[RoundRecord]) -> dict[str, tuple[int, int]]:
    """client -> (bytes that it was sent, bytes of its updates that arrived), over all rounds."""
    down, up = dict[str, int](), dict[str, int]()
    for record in history:
        for name in {*record.clients, *record.refused, *record.late}:
            down[name] = down.get(name, 0) + record.bytes_down
        for name, size in record.bytes_up.items():
            up[name] = up.get(name, 0) + size
    return {name: (down[name], up.get(name, 0)) for name in sorted(down)}


def summary(
    history: Sequence[RoundRecord], metric: str, target: float | None, *, higher_is_better: bool
) -> dict[str, Any]:
    """JSON-ready. bytes: of model arrays, without framing."""
    moved = traffic(history)
    found: dict[str, Any] = {
        "seconds": seconds(history)[-1] if history else 0.0,
        "late": sum(len(record.late) for record in history),
        "bytes_by_client": {name: {"down": down, "up": up} for name, (down, up) in moved.items()},
        "mean_bytes_down": float(np.mean([d for d, _ in moved.values()])) if moved else 0.0,
        "mean_bytes_up": float(np.mean([u for _, u in moved.values()])) if moved else 0.0,
    }
    if target is not None:
        found["target"] = target
        found["seconds_to_target"] = time_to(history, metric, target, higher_is_better=higher_is_better)
    return found


def picture(history: Sequence[RoundRecord], metric: str, target: float | None = None) -> bytes:
    """PNG: the metric over virtual time, and the bytes that each client moved."""
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    pairs = [(t, s) for t, s in zip(seconds(history), scores(history, metric), strict=True) if s is not None]
    unit, name = (3600.0, "hours") if pairs and pairs[-1][0] > 7200 else (1.0, "seconds")
    left.plot([t / unit for t, _ in pairs], [s for _, s in pairs], color=COLOURS[0], marker="o", markersize=3)
    if target is not None:
        left.axhline(target, color=COLOURS[1], linestyle="--", linewidth=1)
    left.set(xlabel=f"virtual {name}", ylabel=metric)
    moved = traffic(history)
    most = max((max(both) for both in moved.values()), default=0)
    scale, bytes_name = next((e for e in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= e[0]), (1.0, "bytes"))
    for index, label in enumerate(("down", "up")):
        values = sorted((both[index] / scale for both in moved.values()), reverse=True)
        right.plot(range(1, len(values) + 1), values, drawstyle="steps-mid", color=COLOURS[index], label=label)
    right.set(xlabel="clients, sorted by traffic", ylabel=f"{bytes_name} over the run", ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    return png(figure)
