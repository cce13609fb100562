"""What came out of an experiment: means and intervals over seeds for each setting, as a table, curves and an HTML page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import IntegrityError
from fl_core.storage import atomic
from fl_server.history import RoundRecord, read_history
from simulations.experiments.cell import RUN
from simulations.experiments.plan import RESULT, Cell

REPORT, CURVES = "report.html", "curves.png"
# Student's t, two-sided 95 %, by degrees of freedom; from 30 on the normal distribution's 1.96 is within 5 %.
T_975 = (
    *(
        math.inf,
        12.706,
        4.303,
        3.182,
        2.776,
        2.571,
        2.447,
        2.365,
        2.306,
        2.262,
        2.228,
        2.201,
        2.179,
        2.160,
        2.145,
        2.131,
    ),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)


@dataclass(frozen=True)
class Interval:
    """mean and half width of its 95 % interval over ``count`` seeds (0 for a single one: nothing is known)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half:.4f}" if self.count > 1 else f"{self.mean:.4f}"


def interval(values: Sequence[float]) -> Interval:
    count = len(values)
    mean = statistics.fmean(values)
    if count < 2:
        return Interval(mean, 0.0, count)
    t = T_975[count - 1] if count <= len(T_975) else 1.96
    return Interval(mean, t * statistics.stdev(values) / math.sqrt(count), count)


@dataclass(frozen=True)
class Outcome:
    """One finished cell."""

    cell: Cell
    result: dict[str, Any]
    history: list[RoundRecord]


def outcomes(out: Path, cells: Sequence[Cell]) -> list[Outcome]:
    found = []
    for cell in cells:
        file = out / cell.name / RESULT
        if not file.is_file():
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise IntegrityError(f"{file}: not valid JSON: {error}") from None
        found.append(Outcome(cell, result, read_history(out / cell.name / RUN)))
    return found


def by_setting(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    table: dict[str, list[Outcome]] = {}
    for outcome in found:
        table.setdefault(outcome.cell.setting_name, []).append(outcome)
    return table


def summary(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each setting: seeds, and the mean and interval of each final metric."""
    rows = []
    for name, group in by_setting(found).items():
        metrics = [o.result["metrics"] for o in group]
        names = sorted({k for m in metrics for k in m})
        each = {k: interval([m[k] for m in metrics if k in m]) for k in names}
        rows.append(
            {
                "setting": name,
                "settings": group[0].cell.settings,
                "seeds": [o.cell.seed for o in group],
                "metrics": {k: {"mean": v.mean, "half_width": v.half, "count": v.count} for k, v in each.items()},
                "seconds": statistics.fmean(o.result["seconds"] for o in group),
                "updates_per_second": sum(o.result["updates"] for o in group)
                / max(1e-9, sum(o.result["seconds"] for o in group)),
            }
        )
    return rows


def curve(group: Sequence[Outcome], metric: str) -> tuple[list[float], list[float], list[float]]:
    """(rounds, mean, half width) of a metric over the seeds, in the rounds in which all of them have it."""
    series: list[Mapping[int, float]] = [
        {r.round: values[metric] for r in o.history if metric in (values := r.held_out or r.evaluation)} for o in group
    ]
    rounds = sorted(set.intersection(*(set(s) for s in series)))
    points = [interval([s[r] for s in series]) for r in rounds]
    return [float(r) for r in rounds], [p.mean for p in points], [p.half for p in points]


def write_report(
    out: Path, found: Sequence[Outcome], failed: Mapping[str, str], *, metric: str, higher_is_better: bool, title: str
) -> None:
    """``report.html`` and ``curves.png``; needs matplotlib."""
    from fl_core.report import charts
    from fl_core.report.page import Page

    groups, rows = by_setting(found), summary(found)
    rows.sort(key=lambda r: r["metrics"].get(metric, {}).get("mean", -math.inf), reverse=higher_is_better)
    series = {r["setting"]: curve(groups[r["setting"]], metric) for r in rows}
    picture = charts.bands({k: v for k, v in series.items() if v[0]}, x_label="round", y_label=metric)
    atomic.write_bytes(out / CURVES, picture)
    seeds = sorted({o.cell.seed for o in found})
    page = Page(title, f"{len(rows)} settings, seeds {', '.join(map(str, seeds))}; intervals are 95 % over the seeds")
    if rows:
        best = Interval(**_interval(rows[0]["metrics"].get(metric)))
        page.cards([("best setting", rows[0]["setting"]), (metric, str(best)), ("cells finished", len(found))])
    page.section("Curves").picture(
        picture, f"{metric} on held-out clients; band: 95 % interval of the mean over the seeds"
    )
    names = sorted({k for r in rows for k in r["metrics"]}, key=lambda k: (k != metric, k))
    page.section("Settings").table(
        ["setting", *names, "seeds", "seconds", "updates/s"],
        [
            [
                r["setting"],
                *(str(Interval(**_interval(r["metrics"].get(k)))) if k in r["metrics"] else None for k in names),
                len(r["seeds"]),
                r["seconds"],
                r["updates_per_second"],
            ]
            for r in rows
        ],
    )
    if failed:
        page.section("Failed").table(["cell", "reason"], sorted(failed.items()))
    page.section("Cells").table(
        ["cell", metric, "rounds", "model"],
        [[o.cell.name, o.result["metrics"].get(metric), len(o.history), o.result["model_sha256"][:16]] for o in found],
    )
    page.text("Each cell is a folder with manifest.json: fieldfleet simulate --replay FOLDER repeats it bit for bit.")
    page.write(out / REPORT)


def _interval(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {"mean": math.nan, "half": 0.0, "count": 0}
    return {"mean": found["mean"], "half": found["half_width"], "count": found["count"]}
