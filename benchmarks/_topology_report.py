"""What ``benchmarks topology`` prints and draws: the table over the seeds, the goals, the report."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from applications.topology_optimisation import metrics, pictures, pipeline
from applications.topology_optimisation.pictures import Column
from benchmarks._goals import verdict
from benchmarks._topology_cells import NAMES, Cell, Plan, best, designs, loaded
from benchmarks.quality import interval
from fl_core.learning.examples import Examples
from fl_core.report.page import Page

MOST_ERROR, MOST_VOLUME_ERROR, LEAST_SPEED_UP, BELOW_FLOOR = 0.05, 0.01, 100.0, 0.10
Floors = dict[int, dict[str, float]]


def print_table(seeds: list[list[Cell]], floors: list[Floors]) -> None:
    """Steps and seconds (of processor, by the clock; means) are those of the stage alone; training takes those of all stages."""
    wide = 17 if len(seeds) > 1 else 7
    head = f"{'stage':13} {'network':8} {'optimiser':9} {'steps':>6} {'s':>6} {'clock':>6} {'sharpness':>9}"
    print(head + "  " + "  ".join(f"{n:{wide}}" for n in NAMES))

    def values(found: list[dict[str, float]]) -> str:
        return "  ".join(f"{interval([f[n] for f in found]):{max(wide, len(n))}}" for n in NAMES)

    rows: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in (c for cells in seeds for c in cells):  # a seed that failed early has fewer of them
        rows.setdefault((cell["side"], cell["stage"], cell["architecture"], cell["optimizer"]), []).append(cell)
    for _, row in sorted(rows.items(), key=lambda item: item[0][:2]):
        cell = row[0]
        name = f"{cell['stage']:13} {cell['architecture']:8} {cell['optimizer']:9}"
        errors = [c["error"] for c in row if "error" in c]
        if errors:
            print(f"{name} {errors[0]}")
            continue
        seconds, wall = (statistics.mean(c[k] for c in row) for k in ("seconds", "wall"))
        sharpness = "/".join(f"{s:g}" for s in dict.fromkeys(c["sharpness"] for c in row))
        print(
            f"{name} {cell['steps']:6} {seconds:6.0f} {wall:6.0f} {sharpness:>9}  {values([c['metrics'] for c in row])}"
        )
    for side in floors[0]:
        print(f"{side:<13} {'nearest known design':49}  {values([f[side] for f in floors])}")


def judge(seeds: list[list[Cell]], floors: list[Floors], speeds: dict[str, float], side: int) -> int:
    """Prints each goal of the finer grid, on the mean of the seeds; 1 where one is missed."""
    chosen = [cell for cells in seeds if (cell := best(cells, side))]
    if len(chosen) < len(seeds):
        return verdict({f"a network at {side}^3 from each of {len(seeds)} seeds": False})
    error, volume = (statistics.mean(c["metrics"][n] for c in chosen) for n in ("compliance_error", "volume_error"))
    floor = statistics.mean(f[side]["compliance_error"] for f in floors)
    goals = {
        f"mean compliance {error:+.3f} of SIMP's, at most {MOST_ERROR:+}": error <= MOST_ERROR,
        f"volume error {volume:.1e}, at most {MOST_VOLUME_ERROR}": volume <= MOST_VOLUME_ERROR,
        f"below the nearest known design's {floor:+.3g} by at least {BELOW_FLOOR}": floor - error >= BELOW_FLOOR,
    }
    if speeds:
        times = speeds["simp"] / speeds["network"]
        goals[f"{times:.0f} times faster than SIMP, at least {LEAST_SPEED_UP:.0f}"] = times >= LEAST_SPEED_UP
    print(f"{side}^3, {len(seeds)} seeds, on each the network that is stiffest on the validation problems")
    return verdict(goals)


def report(cells: list[Cell], floors: Any, speeds: Any, found: dict[str, Examples], plan: Plan, out: Path) -> None:
    """report.html: the table, the speeds, slices and structures of three unseen problems of each grid."""
    page = Page("Topology optimisation", "Networks against SIMP on problems that training never saw")
    rows = [
        [
            c["stage"],
            c["architecture"],
            c["optimizer"],
            c["steps"],
            c["seconds"],
            c["wall"],
            *(c["metrics"][n] for n in NAMES),
        ]
        for c in cells
        if "metrics" in c
    ]
    rows += [
        [f"{s}^3", "nearest known design", "", None, None, None, *(f[n] for n in NAMES)] for s, f in floors.items()
    ]
    page.section("Table").table(["stage", "network", "optimiser", "steps", "seconds", "by the clock", *NAMES], rows)
    if speeds:
        page.section("Speed, processor seconds a problem").table(list(speeds), [list(speeds.values())])
    for side in plan.sides:
        cell = best(cells, side)
        if cell is None:
            continue
        model, _ = loaded(cell, out)
        test = found[f"test{side}"].take(slice(0, 4))
        density = designs(model, cell["sharpness"], test)
        truth = pipeline.target_density(test.targets)
        page.section(f"{cell['stage']}: {cell['architecture']} by {cell['optimizer']}")
        for i in range(len(test)):
            name = str(test.columns["example_id"][i])
            error = metrics.compliance_error(density[i].astype(np.float64), test, i)
            load = np.sqrt((test.inputs["force"][i] ** 2).sum(axis=0))
            held = test.inputs["fixed"][i].any(axis=0)
            columns = {
                "strain energy, solid (log)": Column(
                    field=test.inputs["response"][i][0], colours="magma", least=-2.0, most=2.0
                ),
                "loads (+), supports (-)": Column(
                    field=load - held, colours="RdBu_r", least=-1.0, most=1.0, through=True
                ),
                "SIMP": Column(field=truth[i], colours="Greys", least=0.0, most=1.0),
                "network": Column(field=density[i], colours="Greys", least=0.0, most=1.0),
                "network - SIMP": Column(field=density[i] - truth[i], colours="RdBu", least=-1.0, most=1.0),
            }
            caption = f"{name}: compliance error {error:+.3f}"
            page.picture(pictures.structures({"SIMP": truth[i], "network": density[i]}, caption), caption)
            page.picture(pictures.slices(columns, caption), caption)
    page.write(out / "report.html")
    print(f"report: {out / 'report.html'}")
