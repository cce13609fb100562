"""plant_anomaly fitted on the healthy leaves of one site: that site's diseases, and the healthy leaves of other sites.

    python -m benchmarks.plant_anomaly [--data DIR] [--site RS] [--seeds 3] [--first-seed 0] [--quick]

Real data: tomato_leaf under FIELDFLEET_DATA. A seed draws which groups of the site's healthy leaves are learned from (70 %; of these a fifth is kept
for the threshold); the other 30 % are the healthy side of each score. Only a site with healthy and sick leaves gives an honest score: elsewhere the
site tells the two apart. ``transfer`` has healthy leaves of the other sites as its healthy side: is a new place taken for a disease? One result
file a seed under runs/benchmarks/plant_anomaly; a repeated call resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly import APPLICATION, detect, pipeline
from applications.plant_anomaly.config import Config
from applications.plant_anomaly.data import Photographs
from applications.plant_anomaly.floor import colour_neighbours
from applications.plant_anomaly.metrics import rate_at
from benchmarks import _kept as kept
from benchmarks._goals import verdict
from benchmarks.quality import call, interval
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from fl_core.learning.partition import client_data
from fl_core.learning.trained import Trained, load
from fl_core.runtime import scores
from fl_core.storage import atomic

RESULTS = Path("runs/benchmarks/plant_anomaly")
LEARNED = 0.7
FALSE_ALARMS = 0.05
GOALS = {"early_blight": 0.99, "late_blight": 0.995}
TRANSFER, FOUND = 0.97, 0.95
SMALL = ("model.width=8", "pretrain.epochs=2", "data.image_size=64")
Rows = dict[str, dict[str, float]]
Array = npt.NDArray[Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plant_anomaly")
    parser.add_argument("--data", metavar="DIR", help="default: $FIELDFLEET_DATA/tomato_leaf")
    parser.add_argument("--site", default="RS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one seed, generated fields, two epochs")
    args = parser.parse_args(arguments)
    folder, site = args.data or os.path.join(os.environ.get("FIELDFLEET_DATA", ""), "tomato_leaf"), args.site
    if args.quick:
        folder, site = "generated", "field-0000"
    elif not Path(folder).is_dir():
        print("plant_anomaly: needs tomato_leaf; set FIELDFLEET_DATA, or --data", file=sys.stderr)
        return 0
    drawn = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
    seeds = [measured(folder, site, seed, quick=args.quick) for seed in drawn]
    print(f"plant_anomaly on {folder}, fitted on healthy {site}, {len(seeds)} seeds; mean ± half of the 95 % interval")
    for row in seeds[0]:
        print(f"  {row:36} " + "  ".join(f"{m} {interval([s[row][m] for s in seeds])}" for m in seeds[0][row]))
    return 0 if args.quick else judge(seeds)


def measured(folder: str, site: str, seed: int, *, quick: bool) -> Rows:
    work = RESULTS / ("quick" if quick else Path(folder).name) / f"{site}-{seed}"
    done = work / "rows.json"
    config: Config = APPLICATION.configure(SMALL if quick else (), preset="leaves")
    kept.check(work, {"leaves": config})
    if done.is_file():
        found: Rows = json.loads(done.read_text())
        return found
    raw = read(folder, config)
    fit, rest = parted(raw, site, seed)
    if not (work / "fit").is_dir():
        fit.write(work / "fit")
    common = ["--data", str(work / "fit"), "--seed", str(seed)]
    settings = [f"--set={s}" for s in ("data.holdout_fraction=0.0", *(SMALL if quick else ()))]
    call("pretrain", "plant_anomaly", "--preset", "leaves", "--out", str(work / "encoder"), *common, *settings)
    head = [
        "--preset",
        "leaves",
        "--from",
        str(work / "encoder"),
        "--rounds",
        "1",
        "--set",
        "algorithm.name=statistics_head",
    ]
    call("simulate", "plant_anomaly", *head, "--out", str(work / "model"), *common, *settings)
    rows = judged(load(APPLICATION, work / "model"), config, fit, rest, site, seed)
    atomic.write_json(done, rows)
    return rows


def read(folder: str, config: Config) -> Photographs:
    if folder == "generated":
        return APPLICATION.generate(config, 0).select([f"field-{k:04d}" for k in range(3)])  # type: ignore[return-value]
    return APPLICATION.read(Path(folder))  # type: ignore[return-value]


def parted(raw: Photographs, site: str, seed: int) -> tuple[Photographs, Photographs]:
    """(what is learned from, everything else), by groups of the site's healthy leaves."""
    healthy = [p for p in raw.items if p.site == site and p.label == "healthy"]
    groups = sorted({p.group for p in healthy})
    order = seeding.generator(seed, "anomaly groups").permutation(len(groups))
    chosen = {groups[k] for k in order[: round(LEARNED * len(groups))]}
    fit = tuple(p for p in healthy if p.group in chosen)
    files = {p.file for p in fit}
    return Photographs(fit), Photographs(tuple(p for p in raw.items if p.file not in files))


def judged(model: Trained, config: Config, fit: Photographs, rest: Photographs, site: str, seed: int) -> Rows:
    learned, others = fit.examples(config), rest.examples(config)
    parts = client_data(learned, site, config.data.validation_fraction, seed)
    outputs = model.predict(others)
    distance = pipeline.distance(outputs["latent"])
    kept = pipeline.distance(model.predict(parts.validation)["latent"])
    floor = next(iter(colour_neighbours(config, parts.train, others, seed=seed).values()))
    threshold = detect.conformal_threshold(kept, max(FALSE_ALARMS, 1 / len(kept)))
    sick = others.columns["sick"].astype(bool)
    home = others.columns["site"] == site
    rows = {
        "latent distance": by_label(distance, others, site),
        "heat": by_label(pipeline.heat_score(outputs["heat"]), others, site),
        "floor: colours, nearest neighbours": by_label(pipeline.distance(floor["latent"]), others, site),
    }
    rows["threshold of 5 % false alarms"] = {
        "found": float((distance[sick] > threshold).mean()),
        "found at 5 % of the other healthy": rate_at(distance[sick | home], sick[sick | home], FALSE_ALARMS) or 0.0,
        f"found {site}": float((distance[sick & home] > threshold).mean()),
        f"alarms {site}": float((distance[~sick & home] > threshold).mean()),
        "alarms elsewhere": float((distance[~sick & ~home] > threshold).mean()),
    }
    return rows


def by_label(score: Array, examples: Examples, site: str) -> dict[str, float]:
    """ROC AUC of each disease of the site against its own healthy leaves, and against those of the other sites (transfer)."""
    label, sick = examples.columns["label"], examples.columns["sick"].astype(bool)
    home = examples.columns["site"] == site
    found: dict[str, float | None] = {}
    for name in np.unique(label[home & sick]):
        mine = home & (label == name)
        for kind, healthy in (("", ~sick & home), ("transfer ", ~sick & ~home)):
            chosen = mine | healthy
            found[f"{kind}{name}"] = scores.roc_auc(mine[chosen], score[chosen])
    chosen = sick | home
    found["all diseases"] = scores.roc_auc(sick[chosen], score[chosen])
    return scores.defined(**found)


def judge(seeds: list[Rows]) -> int:
    """Prints each goal; 1 where one is missed."""

    def mean(row: str, metric: str) -> float:
        return statistics.mean(s[row].get(metric, 0.0) for s in seeds)

    goals = {}
    for name, least in GOALS.items():
        value, transfer = mean("latent distance", name), mean("latent distance", f"transfer {name}")
        goals[f"{name}: ROC AUC {value:.4f}, at least {least}"] = value >= least
        goals[f"{name} against other sites' healthy leaves: {transfer:.4f}, at least {TRANSFER}"] = transfer >= TRANSFER
    found = mean("threshold of 5 % false alarms", "found at 5 % of the other healthy")
    goals[f"found above the score that 5 % of the other healthy leaves exceed: {found:.3f}, at least {FOUND}"] = (
        found >= FOUND
    )
    return verdict(goals)


if __name__ == "__main__":
    sys.exit(main())
