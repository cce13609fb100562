"""plant_segmentation: instances on generated fields never seen, and lesions of soy_rust on photographs never seen; the goals.

    python -m benchmarks.plant_segmentation [--data DIR] [--seeds 3] [--parts fields lesions] [--quick]

Both parts train by ``fieldfleet pretrain`` and judge whole photographs of clients that training never saw by
``applications.plant_segmentation.segment``, which also draws them (runs/benchmarks/plant_segmentation/PART-SEED/photographs/report.html). ``lesions``
needs soy_rust under FIELDFLEET_DATA (or --data); its clients are blocks of four photographs, of which a quarter is held out. One result file a
cell; a repeated call resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._goals import verdict
from benchmarks.quality import call, interval
from fl_core.learning.application import application
from fl_core.learning.partition import split_clients
from fl_core.learning.sources import open_data
from fl_core.storage import atomic

APP = "plant_segmentation"
RESULTS = Path("runs/benchmarks") / APP
SHOWN = ("symmetric_best_dice", "count_difference", "ap50", "ap50_95", "foreground_dice", "foreground_iou")
SETTINGS = {"fields": [], "lesions": ["data.holdout_fraction=0.25"]}
PRESETS = {"fields": "default", "lesions": "lesions"}
SMALL = ("data.clients=5", "data.images_per_client=6", "model.width=8", "pretrain.epochs=2")
LEAST_DICE, MOST_COUNTS, ABOVE_FLOOR, LEAST_LESIONS = 0.85, 1.0, 0.10, 0.925
Rows = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plant_segmentation")
    parser.add_argument("--data", metavar="DIR", help="of lesions; default: $FIELDFLEET_DATA/soy_rust")
    parser.add_argument("--parts", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, few small fields, two epochs, no lesions")
    args = parser.parse_args(arguments)
    folder = args.data or os.path.join(os.environ.get("FIELDFLEET_DATA", ""), "soy_rust")
    met = True
    for part in args.parts:
        data = "generated" if part == "fields" else folder
        if part == "lesions" and (args.quick or not Path(data).is_dir()):
            print("lesions: left out; needs soy_rust, set FIELDFLEET_DATA or --data", file=sys.stderr)
            continue
        seeds = [measured(part, data, seed, quick=args.quick) for seed in range(1 if args.quick else args.seeds)]
        print(
            f"{APP}, {part}, whole photographs of unseen clients, {len(seeds)} seeds; mean ± half of the 95 % interval"
        )
        for row in seeds[0]:
            print(
                f"  {row:34} "
                + "  ".join(f"{m} {interval([s[row][m] for s in seeds])}" for m in SHOWN if m in seeds[0][row])
            )
        met &= args.quick or judge(part, seeds)
    return 0 if met else 1


def measured(part: str, data: str, seed: int, *, quick: bool) -> Rows:
    """Trained, segmented and scored once; ``rows.json`` keeps the result."""
    work = RESULTS / f"{'quick-' if quick else ''}{part}-{seed}"
    done = work / "rows.json"
    if done.is_file():
        found: Rows = json.loads(done.read_text())
        return found
    settings = [f"--set={s}" for s in (*SETTINGS[part], *(SMALL if quick else ()))]
    common = ["--data", data, "--seed", str(seed)]
    call("pretrain", APP, "--preset", PRESETS[part], "--out", str(work / "model"), *common, *settings)
    report = work / "photographs" / "report.json"  # written with the folder, as a whole
    if not report.is_file():
        print("  segment", work, file=sys.stderr, flush=True)
        command = [
            sys.executable,
            "-m",
            f"applications.{APP}.segment",
            str(work / "model"),
            "--unseen",
            *(["--mirror"] if part == "lesions" else []),
            "--out",
            str(report.parent),
            *common,
        ]
        subprocess.run(command, stdout=sys.stderr, check=True)
    rows: Rows = json.loads(report.read_text())["scores"]
    rows = {"model": rows["model"]} if quick else {"model": rows["model"], **tiles_floor(part, data, seed)}
    atomic.write_json(done, rows)
    return rows


def tiles_floor(part: str, data: str, seed: int) -> Rows:
    """The application's classical methods, fitted on the training clients, on tiles of the same unseen photographs."""
    app = application(APP)
    config = app.configure(SETTINGS[part], preset=PRESETS[part])
    method = app.floor_function()
    assert method is not None
    examples = open_data(app, config, data, seed=seed).raw.examples(config)
    clients, held = split_clients(examples.clients(), config.data.holdout_fraction, seed)
    test = examples.of_clients(held)
    rows = method(config, examples.of_clients(clients), test, seed=seed)
    return {f"floor: {name}": app.metrics(config, outputs, test) for name, outputs in rows.items()}


def judge(part: str, seeds: list[Rows]) -> bool:
    """Prints each goal; whether all are met."""

    def mean(row: str, metric: str) -> float:
        return statistics.mean(s[row][metric] for s in seeds)

    if part == "lesions":
        value = mean("model", "foreground_dice")
        goals = {f"Dice {value:.4f}, at least {LEAST_LESIONS}": value >= LEAST_LESIONS}
    else:
        dice, count = mean("model", "symmetric_best_dice"), mean("model", "count_difference")
        floor = mean("floor: watershed on excess green", "symmetric_best_dice")
        goals = {
            f"symmetric best Dice {dice:.4f}, at least {LEAST_DICE}": dice >= LEAST_DICE,
            f"difference in count {count:.3f}, at most {MOST_COUNTS}": count <= MOST_COUNTS,
            f"above the floor of {floor:.4f} by at least {ABOVE_FLOOR}": dice - floor >= ABOVE_FLOOR,
        }
    return verdict(goals) == 0


if __name__ == "__main__":
    sys.exit(main())
