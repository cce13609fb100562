"""seismic_facies on whole volumes of surveys never trained on: the 3-D net, its 2-D twin, the floors, and the goals.

    python -m benchmarks.seismic_facies [--data DIR] [--seeds 3] [--epochs N] [--alone] [--quick]

Both nets are trained by ``fieldfleet pretrain`` on the same data and judged by ``applications.seismic_facies.segment``, which also draws
them side by side: runs/benchmarks/seismic_facies/seed-N/volumes/report.html. A repeated call resumes. Goals, on the mean of the
seeds: mean IoU of at least 0.80, at least 0.10 above the floor, and at most half of the twin's excess label changes between slices.
--alone leaves the twin out, and with it the last goal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _kept as kept
from benchmarks._goals import verdict
from benchmarks.quality import UNSEEN, call, floors, interval
from fl_core.learning.application import application
from fl_core.storage import atomic

APP = "seismic_facies"
RESULTS = Path("runs/benchmarks/seismic_facies")
NETS = {"3-D": "attributes", "2-D twin": "attributes_twin"}
SMALL = ("clients=5", "volumes_per_client=2", "inlines=32", "crosslines=32", "samples=32", "crop=16", "stride=16")
LEAST_IOU, ABOVE_FLOOR, MOST_CHANGES = 0.80, 0.10, 0.5
Rows = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seismic_facies")
    parser.add_argument("--data", default="generated", metavar="DIR", help="labelled volumes (default: generated)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="of both nets (default: as their presets say)")
    parser.add_argument("--alone", action="store_true", help="the 3-D net and the floors, without the twin")
    parser.add_argument("--quick", action="store_true", help="one seed, small volumes, two epochs, no floor")
    args = parser.parse_args(arguments)
    nets = list(NETS)[: 1 if args.alone else None]
    seeds = [
        measured(args.data, seed, args.epochs, nets, quick=args.quick)
        for seed in range(1 if args.quick else args.seeds)
    ]
    print(
        f"{APP} on {args.data}, whole volumes of unseen surveys, {len(seeds)} seeds; mean ± half of the 95 % interval"
    )
    for row in seeds[0]:
        names = seeds[0][row]
        print(f"  {row:38} " + "  ".join(f"{m} {interval([s[row][m] for s in seeds])}" for m in names))
    return 0 if args.quick else judge(seeds)


def measured(data: str, seed: int, epochs: int, nets: list[str], *, quick: bool) -> Rows:
    """Trained, segmented and scored once; ``rows.json`` keeps the result (``rows-alone.json`` without the twin)."""
    kind = "quick" if quick else Path(data).name + (f"-{epochs}-epochs" if epochs else "")
    folder = RESULTS / kind / f"seed-{seed}"
    suffix = "" if len(nets) > 1 else "-alone"
    done = folder / f"rows{suffix}.json"
    common = ["--data", data, "--seed", str(seed)]
    small = [f"--set=data.{s}" for s in SMALL] if quick else []
    if epochs or quick:
        small.append(f"--set=pretrain.epochs={epochs or 2}")
    settings = [s.removeprefix("--set=") for s in small]
    configs = {preset: application(APP).configure(settings, preset=preset) for preset in NETS.values()}
    kept.check(folder, configs)
    if done.is_file():
        found: Rows = json.loads(done.read_text())
        return found
    for row in nets:
        call("pretrain", APP, "--preset", NETS[row], "--out", str(folder / row.replace(" ", "-")), *common, *small)
    models = [folder / row.replace(" ", "-") for row in nets]
    rows = dict(zip(nets, segmented(models, folder / f"volumes{suffix}", common), strict=True))
    if not quick:
        rows |= floor_rows(folder / "floors.json", data, seed)
    atomic.write_json(done, rows)
    return rows


def floor_rows(path: Path, data: str, seed: int) -> Rows:
    """Kept in ``path``, since the attributes of all sub-volumes take minutes."""
    if not path.is_file():
        found = floors(APP, data, seed, preset=NETS["3-D"])
        atomic.write_json(path, {name: groups[UNSEEN]["metrics"] for name, groups in found.items()})
    rows: Rows = json.loads(path.read_text())
    return rows


def segmented(models: list[Path], out: Path, common: list[str]) -> list[dict[str, float]]:
    """All nets on the same whole volumes; the pictures stay in ``out``."""
    report = out / "report.json"  # written with the folder, as a whole
    if not report.is_file():
        first, *others = map(str, models)
        compare = ["--compare", *others] if others else []
        command = [sys.executable, "-m", "applications.seismic_facies.segment", first, *compare, "--unseen"]
        print("  segment", out, file=sys.stderr, flush=True)
        subprocess.run([*command, "--out", str(out), *common], stdout=sys.stderr, check=True)
    scores: list[dict[str, float]] = json.loads(report.read_text())["scores"]
    return scores


def judge(seeds: list[Rows]) -> int:
    """Prints each goal; 1 where one is missed."""

    def mean(row: str, metric: str) -> float:
        return statistics.mean(s[row][metric] for s in seeds)

    iou = mean("3-D", "mean_iou")
    floor = max(mean(row, "mean_iou") for row in seeds[0] if row.startswith("floor"))
    goals = {
        f"mean IoU {iou:.3f}, at least {LEAST_IOU}": iou >= LEAST_IOU,
        f"above the floor of {floor:.3f} by at least {ABOVE_FLOOR}": iou - floor >= ABOVE_FLOOR,
    }
    if all(row in seeds[0] for row in NETS):
        ours, twin = (mean(row, "excess_slice_changes") for row in NETS)
        goals[f"excess changes {ours:.4f}, at most half of the twin's {twin:.4f}"] = ours <= MOST_CHANGES * twin
    return verdict(goals)


if __name__ == "__main__":
    sys.exit(main())
