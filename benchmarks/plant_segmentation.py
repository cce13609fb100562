"""plant_segmentation: instances on generated fields never seen, and lesions of soy_rust on photographs never seen; the goals.

    python -m benchmarks.plant_segmentation [--data DIR] [--seeds 3] [--first-seed 0] [--parts fields lesions blocks] [--quick]

All parts train by ``fieldfleet pretrain`` and judge whole photographs that training never saw by
``applications.plant_segmentation.segment``, which also draws them (runs/benchmarks/plant_segmentation/PART-SEED/photographs/report.html). ``fields``
are of clients never seen. ``lesions`` and ``blocks`` need soy_rust under FIELDFLEET_DATA (or --data). ``lesions`` sets a quarter of the photographs
of each shape aside, whatever their neighbours; ``blocks``, which is harder, a quarter of the blocks of four that follow each other, which are its
clients: what was photographed together is then never on both sides. One result file a cell; a repeated call resumes.
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
from typing import cast

from applications.plant_segmentation.data import Pictures
from benchmarks import _kept as kept
from benchmarks._goals import verdict
from benchmarks.quality import call, interval
from fl_core.contracts.errors import EnvironmentFault
from fl_core.learning import seeding
from fl_core.learning.application import application
from fl_core.learning.partition import split_clients
from fl_core.learning.sources import open_data
from fl_core.storage import atomic

APP = "plant_segmentation"
RESULTS = Path("runs/benchmarks") / APP
SHOWN = ("symmetric_best_dice", "count_difference", "ap50", "ap50_95", "foreground_dice", "foreground_iou")
TESTED = 0.25  # of the photographs, or of the blocks
SETTINGS = {"fields": [], "lesions": ["data.holdout_fraction=0"], "blocks": [f"data.holdout_fraction={TESTED}"]}
PRESETS = {"fields": "default", "lesions": "lesions", "blocks": "lesions"}
SMALL = ("data.clients=5", "data.images_per_client=6", "model.width=8", "pretrain.epochs=2")
LEAST_DICE, MOST_COUNTS, ABOVE_FLOOR, LEAST_LESIONS = 0.85, 1.0, 0.10, 0.925
Rows = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plant_segmentation")
    parser.add_argument("--data", metavar="DIR", help="of lesions; default: $FIELDFLEET_DATA/soy_rust")
    parser.add_argument("--parts", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one seed, few small fields, two epochs, no lesions")
    args = parser.parse_args(arguments)
    folder = args.data or os.path.join(os.environ.get("FIELDFLEET_DATA", ""), "soy_rust")
    met = True
    for part in args.parts:
        data = "generated" if part == "fields" else folder
        if part != "fields" and (args.quick or not Path(data).is_dir()):
            print(f"{part}: left out; needs soy_rust, set FIELDFLEET_DATA or --data", file=sys.stderr)
            continue
        drawn = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
        seeds = [measured(part, data, seed, quick=args.quick) for seed in drawn]
        print(f"{APP}, {part}, whole photographs never seen, {len(seeds)} seeds; mean ± half of the 95 % interval")
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
    settings = [*SETTINGS[part], *(SMALL if quick else ())]
    config = application(APP).configure(settings, preset=PRESETS[part])
    kept.check(work, {PRESETS[part]: config})
    if done.is_file():
        found: Rows = json.loads(done.read_text())
        return found
    train, test, unseen = data, data, ["--unseen"]
    if part == "lesions":
        (train, test), unseen = set_aside(Path(data), seed, work), []
    call(
        *("pretrain", APP, "--preset", PRESETS[part], "--data", train, "--seed", str(seed)),
        *("--out", str(work / "model"), *(f"--set={s}" for s in settings)),
    )
    report = work / "photographs" / "report.json"  # written with the folder, as a whole
    if not report.is_file():
        print("  segment", work, file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"applications.{APP}.segment", str(work / "model"), *unseen]
        command += ["--mirror", "--data", test, "--seed", str(seed), "--out", str(report.parent)]
        ended = subprocess.run(command, stdout=sys.stderr).returncode
        if ended:
            raise EnvironmentFault(f"segment ended with {ended}", remedy="its own message stands above")
    rows: Rows = {"model": json.loads(report.read_text())["scores"]["model"]}
    if not quick:
        rows |= tiles_floor(part, train, test, seed)
    atomic.write_json(done, rows)
    return rows


def set_aside(folder: Path, seed: int, work: Path) -> tuple[str, str]:
    """Folders of the photographs to train and to test on: a quarter of each shape's, drawn by the seed."""
    pictures = cast(Pictures, application(APP).read(folder)).pictures
    shapes: dict[str, list[str]] = {}
    for picture in pictures:
        shapes.setdefault(picture.client.rpartition("-")[0], []).append(picture.name)
    tested = set[str]()
    for shape, names in sorted(shapes.items()):
        order = seeding.generator(seed, f"photographs of {shape}").permutation(len(names))
        tested.update(names[k] for k in order[: max(1, round(TESTED * len(names)))])
    for name, inside in (("train", False), ("test", True)):
        if not (work / name).is_dir():
            Pictures(tuple(p for p in pictures if (p.name in tested) == inside)).write(work / name)
    return str(work / "train"), str(work / "test")


def tiles_floor(part: str, train: str, test: str, seed: int) -> Rows:
    """The application's classical methods, fitted on what the model learned from, on tiles of the same unseen photographs."""
    app = application(APP)
    side = app.configure(preset=PRESETS[part]).data.image_size
    config = app.configure([*SETTINGS[part], f"data.stride={side}"], preset=PRESETS[part])  # each pixel counts once
    method = app.floor_function()
    assert method is not None
    learned = open_data(app, config, train, seed=seed).raw.examples(config)
    if train == test:
        clients, held = split_clients(learned.clients(), config.data.holdout_fraction, seed)
        learned, unseen = learned.of_clients(clients), learned.of_clients(held)
    else:
        unseen = open_data(app, config, test, seed=seed).raw.examples(config)
    rows = method(config, learned, unseen, seed=seed)
    return {f"floor: {name}": app.metrics(config, outputs, unseen) for name, outputs in rows.items()}


def judge(part: str, seeds: list[Rows]) -> bool:
    """Prints each goal; whether all are met."""

    def mean(row: str, metric: str) -> float:
        return statistics.mean(s[row][metric] for s in seeds)

    if part != "fields":
        value = mean("model", "foreground_dice")
        floor = mean("floor: boosted trees on pixel colours", "foreground_dice")
        goals = {
            f"{part}: Dice {value:.4f}, at least {LEAST_LESIONS}": value >= LEAST_LESIONS,
            f"{part}: above the floor of {floor:.4f}": value > floor,
        }
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
