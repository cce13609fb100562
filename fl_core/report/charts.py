"""Pictures as PNG bytes: learning curves, bars, lineage. Colours are from the Okabe-Ito palette (readable by all)."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _axes(width: float = 9.0, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def lines(series: Series, *, x_label: str, y_label: str, title: str = "") -> bytes:
    """One line a name: name -> (x values, y values)."""
    figure, axes = _axes()
    for i, (name, (x, y)) in enumerate(series.items()):
        axes.plot(x, y, label=name, color=COLOURS[i % len(COLOURS)], marker="o" if len(x) < 25 else "", markersize=3.5)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if len(series) > 1:
        axes.legend(frameon=False)
    return png(figure)


def bands(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]], *, x_label: str, y_label: str
) -> bytes:
    """One line a name with its interval: name -> (x values, middle, half width of the interval).

    A line that goes far beyond all others leaves the picture instead of flattening it.
    """
    figure, axes = _axes(height=4.2)
    for i, (name, (x, middle, half)) in enumerate(series.items()):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        marker = "o" if len(x) < 25 else ""
        axes.plot(x, middle, label=name, color=colour, linestyle=style, marker=marker, markersize=3.5)
        low = [m - h for m, h in zip(middle, half, strict=True)]
        axes.fill_between(x, low, [m + h for m, h in zip(middle, half, strict=True)], color=colour, alpha=0.15, lw=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    middles = [m for _, middle, _ in series.values() for m in middle]
    if len(middles) > 3:
        first, _, third = statistics.quantiles(middles, n=4)
        room = 4 * (third - first) or 1.0
        kept = [m for m in middles if first - room <= m <= third + room]
        if len(kept) < len(middles):
            margin = 0.15 * (max(kept) - min(kept)) or 0.1
            axes.set_ylim(min(kept) - margin, max(kept) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def two_panels(
    left: Series, right: Series, *, x_label: str, y_labels: tuple[str, str], logarithmic: bool = False
) -> bytes:
    """Two line charts side by side over the same kind of x; logarithmic: all axes, so that powers are straight lines."""
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    for column, (series, y_label) in enumerate(zip((left, right), y_labels, strict=True)):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        for i, (name, (x, y)) in enumerate(series.items()):
            axes.plot(
                x, y, label=name, color=COLOURS[i % len(COLOURS)], marker="o" if len(x) < 25 else "", markersize=3.5
            )
        axes.set(xlabel=x_label, ylabel=y_label)
        if logarithmic:
            axes.set(xscale="log", yscale="log")
            ticks = sorted({value for x, _ in series.values() for value in x})
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if series:
            axes.legend(frameon=False, fontsize=8)
    return png(figure)


def bars(
    groups: Mapping[str, Mapping[str, float]], *, y_label: str, limits: tuple[float, float] | None = None
) -> bytes:
    """Grouped bars: series name -> {category: value}."""
    figure, axes = _axes()
    categories = list(dict.fromkeys(c for values in groups.values() for c in values))
    width = 0.8 / max(1, len(groups))
    for i, (name, values) in enumerate(groups.items()):
        at = [k + (i - (len(groups) - 1) / 2) * width for k in range(len(categories))]
        axes.bar(
            at, [values.get(c, 0.0) for c in categories], width * 0.94, label=name, color=COLOURS[i % len(COLOURS)]
        )
    axes.set_xticks(range(len(categories)), categories, rotation=25 if len(categories) > 6 else 0, fontsize=8)
    axes.set_ylabel(y_label)
    if limits:
        axes.set_ylim(*limits)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return png(figure)


def lineage(steps: Sequence[tuple[str, str]]) -> bytes:
    """Boxes joined by arrows, from the first ancestor to the device: (title, lines of detail)."""
    figure = Figure(figsize=(10, 1.9), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(0, len(steps)), ylim=(0, 1))
    for i, (title, detail) in enumerate(steps):
        axes.add_patch(
            FancyBboxPatch(
                (i + 0.06, 0.14), 0.8, 0.72, boxstyle="round,pad=0.01,rounding_size=0.05", fc="#eef5fb", ec=COLOURS[0]
            )
        )
        axes.text(i + 0.46, 0.7, title, ha="center", va="center", fontsize=9.5, weight="bold", color="#1b2733")
        axes.text(i + 0.46, 0.4, detail, ha="center", va="center", fontsize=7.6, color="#33475b")
        if i:
            axes.annotate(
                "", (i + 0.05, 0.5), (i - 0.12, 0.5), arrowprops={"arrowstyle": "-|>", "color": COLOURS[1], "lw": 1.8}
            )
    return png(figure)
