"""plant_disease on tomato_leaf, six sites of which most hold one class: what a statistics head makes of frozen features, and what moves to a new site.

    python -m benchmarks.plant_disease [--data DIR] [--seeds 3] [--features MODEL] [--quick]

A seed draws which groups are tested on (a quarter). Site and class are confounded, so that overall accuracy says little; what counts is the mean
recall of the classes at RS, the one site with several, and the recall of a class at a site that was left out, where other sites show that
class. Rows: ``untrained`` features (soft histograms beside a random net), those of a net ``trained`` on the tomato leaves of all sites together, and
of --features, a checkpoint of another crop; each with the head from ONE federated round of ``statistics_head`` over the sites. ``pooled head``: the same
from all images as one client, to which the federated one must be equal. ``invariant head``: with ``algorithm.head_invariance``, which leaves out
what sites of one class differ in. ``gradients``: what methods that send gradients' steps reach from the same start, in smaller
pictures and as many passes over the data: pooled, and federated over the sites, alone and with the statistics head on the features that come out; with
--features also from that checkpoint (``pooled from another crop``, ...). One result file a cell; a repeated call resumes.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from applications.plant_disease import APPLICATION, transfer
from applications.plant_disease.data import Leaves
from benchmarks import _kept as kept
from benchmarks._goals import verdict
from benchmarks.quality import call, interval
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning import seeding
from fl_core.learning.torch_arrays import get_arrays
from fl_core.storage import atomic

APP = "plant_disease"
RESULTS = Path("runs/benchmarks") / APP
CLASSES = ("bacterial_spot", "early_blight", "healthy", "late_blight", "target_spot")
SITE = "RS"
TESTED = 0.25
GOAL_RECALL, GOAL_LEFT_OUT, GOAL_EQUAL = 0.92, 0.5, 1e-3
SETTINGS = (
    f"data.classes={json.dumps(CLASSES)}",
    "model.colour_bins=16",
    "data.holdout_fraction=0.0",
    "data.validation_fraction=0.0",
)
GRADIENTS: dict[str, tuple[str, ...]] = {
    "FedAvg": ("algorithm.name=fedavg",),
    "FedProx": ("algorithm.name=fedprox", "algorithm.proximal_mu=0.1"),
    "SCAFFOLD": ("algorithm.name=scaffold", "optimizer.name=sgd", "optimizer.momentum=0", "algorithm.client_lr=0.05"),
    "FedRS": ("algorithm.name=fedrs", "algorithm.restriction=0.5"),
    "FedRS, absent classes not at all": ("algorithm.name=fedrs", "algorithm.restriction=0.0"),
}
FOLLOWED = (
    "--set=algorithm.evaluate_every=0",
    "--set=algorithm.client_lr=0.001",
    "--set=algorithm.schedule=cosine",
    "--set=algorithm.average_last=0.2",
)
INVARIANT, INVARIANCE = ", invariant head", 5.0
PASSES = 20  # of the methods that follow gradients
ELSEWHERE = " from another crop"  # a row's ending: it starts from --features
STARTED = ("pooled", "FedAvg", "FedProx", "FedRS")  # rows that are run from there, too
SMALLER = ("data.image_size=64", "data.colour=0.1")
MOST_BELOW_POOLED = 0.03
EPOCHS = 8  # of the trained features: the head matters more here than many passes
QUICK = ("data.image_size=64", "model.width=8", "data.clients=4", "data.images_per_client=24")
Rows = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plant_disease")
    parser.add_argument("--data", metavar="DIR", help="default: $FIELDFLEET_DATA/tomato_leaf")
    parser.add_argument(
        "--features", type=Path, metavar="MODEL", help="a checkpoint of another crop with the same settings"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", nargs="*", help="only these: untrained, trained, features, gradients")
    parser.add_argument("--methods", nargs="*", metavar="ROW", help="of the cell gradients only these rows, and pooled")
    parser.add_argument("--quick", action="store_true", help="one seed, generated leaves, untrained features, FedAvg")
    args = parser.parse_args(arguments)
    folder = (
        "generated" if args.quick else args.data or os.path.join(os.environ.get("FIELDFLEET_DATA", ""), "tomato_leaf")
    )
    if not args.quick and not Path(folder).is_dir():
        print("plant_disease: needs tomato_leaf; set FIELDFLEET_DATA, or --data", file=sys.stderr)
        return 0
    cells = ["untrained", "gradients"]
    if not args.quick:
        cells += ["trained", *(["features"] if args.features else [])]
    cells = [c for c in cells if not args.cells or c in args.cells]
    seeds = [
        Cell(folder, seed, args.features, args.methods, quick=args.quick).rows(cells)
        for seed in range(1 if args.quick else args.seeds)
    ]
    print(f"{APP} on {folder}, statistics head in one round, {len(seeds)} seeds; mean ± half of the 95 % interval")
    for row in seeds[0]:
        print(f"  {row:28} " + "  ".join(f"{m} {interval([s[row][m] for s in seeds])}" for m in seeds[0][row]))
    return 0 if args.quick else judge(seeds)


class Cell:
    """One seed's folders and rows."""

    def __init__(
        self, folder: str, seed: int, features: Path | None, methods: Sequence[str] | None, *, quick: bool
    ) -> None:
        self.folder, self.seed, self.features, self.methods, self.quick = folder, seed, features, methods, quick
        self.settings = (*SETTINGS, *(QUICK if quick else ()))
        self.work = RESULTS / ("quick" if quick else Path(folder).name) / str(seed)

    def rows(self, cells: Sequence[str]) -> Rows:
        found: Rows = {}
        kept.check(self.work, {"default": APPLICATION.configure(self.settings)})
        self.check_features()
        for cell in cells:
            if cell == "gradients":
                found |= self.gradients()
                continue
            done = self.work / f"{cell}-heads.json"
            if not done.is_file():
                atomic.write_json(done, self.measured(cell))
            found |= json.loads(done.read_text())
        return found

    def check_features(self) -> None:
        """Kept rows are of one --features. Raises InputError for another."""
        kept = self.work / "features"
        if self.features is None or not kept.is_dir():
            return
        if (
            checkpoints.load(kept).manifest.parent_sha256
            != checkpoints.child_lineage(checkpoints.load(self.features))[0]
        ):
            raise InputError(
                f"{self.features}: the rows kept in {self.work} are of another model",
                remedy="give that one, or remove the folder",
            )

    def measured(self, cell: str) -> Rows:
        raw = self.read()
        self.write(raw)
        start = self.start(cell)
        federated = self.head(start, "train", f"{cell}-head")
        pooled = self.head(start, "pooled", f"{cell}-pooled")
        arrays = [checkpoints.load(m).arrays["head.weight"] for m in (federated, pooled)]
        equal = float(np.abs(arrays[0] - arrays[1]).max() / np.abs(arrays[1]).max())
        name = "another crop's features" if cell == "features" else f"{cell} features"
        rows = {
            name: {**self.scored(federated), "federated - pooled head": equal},
            f"{name}{INVARIANT}": self.scored(self.head(start, "train", f"{cell}-invariant", invariant=True)),
        }
        sites = left_out_sites(raw)[: 1 if self.quick else None]
        for row in rows:
            recalls = [r for s in sites for r in self.left_out(raw, start, cell, s, invariant=row.endswith(INVARIANT))]
            if recalls:
                rows[row]["recall at a site left out"] = statistics.mean(recalls)
        return rows

    def gradients(self) -> Rows:
        """Of each method: what it reaches, and with the statistics head on its features."""
        found: Rows = {}
        passes = 2 if self.quick else PASSES
        shown = list(GRADIENTS)[:1] if self.quick else list(GRADIENTS)
        if self.features is not None:
            shown += [method + ELSEWHERE for method in STARTED]
        if self.methods:
            if unknown := set(self.methods) - {"pooled", *shown}:
                raise InputError(
                    f"--methods: unknown: {', '.join(sorted(unknown))}", remedy=f"known: {'; '.join(shown)}"
                )
            shown = [method for method in shown if method in self.methods]
        smaller = copy.copy(self)
        smaller.settings = (*self.settings, *SMALLER)
        for method in ("pooled", *shown):
            name = "gradients-" + method.replace(" ", "-").replace(",", "")
            done = self.work / f"{name}.json"
            if not done.is_file():
                self.write(self.read())
                atomic.write_json(done, smaller.followed(method, name, passes))
            found |= {f"{method}{row}": values for row, values in json.loads(done.read_text()).items()}
        return found

    def followed(self, method: str, name: str, passes: int) -> Rows:
        out = self.work / name
        common = ["--data", str(self.work / "train"), "--seed", str(self.seed), "--out", str(out)]
        common += [f"--set={s}" for s in (*self.settings, "pretrain.batch_size=32", f"pretrain.epochs={passes}")]
        if method.endswith(ELSEWHERE):
            method = method.removesuffix(ELSEWHERE)
            common += ["--from", str(self.start("features"))]
        if method == "pooled":
            call("pretrain", APP, *common)
        else:
            call(
                "simulate", APP, "--rounds", str(passes), *common, *FOLLOWED, *(f"--set={s}" for s in GRADIENTS[method])
            )
        return {"": self.scored(out), ", statistics head": self.scored(self.head(out, "train", f"{name}-head"))}

    def scored(self, model: Path) -> dict[str, float]:
        document = self.evaluated(model, "test")
        home = document["groups"].get(f"site/{SITE}", {"metrics": document["metrics"]})
        return {
            "accuracy": document["metrics"]["accuracy"],
            f"mean recall at {SITE}": home["metrics"]["balanced_accuracy"],
        }

    def read(self) -> Leaves:
        config = APPLICATION.configure(self.settings)
        return cast(Leaves, APPLICATION.generate(config, 0) if self.quick else APPLICATION.read(Path(self.folder)))

    def write(self, raw: Leaves) -> None:
        """train, test (by groups), and pooled: train as one client."""
        groups = sorted({leaf.facts.group for leaf in raw.leaves})
        order = seeding.generator(self.seed, "tomato groups").permutation(len(groups))
        tested = {groups[k] for k in order[: round(TESTED * len(groups))]}
        train = tuple(leaf for leaf in raw.leaves if leaf.facts.group not in tested)
        parts = {"train": train, "test": tuple(leaf for leaf in raw.leaves if leaf.facts.group in tested)}
        parts["pooled"] = tuple(_of_client(leaf, "pooled") for leaf in train)
        for name, leaves in parts.items():
            if not (self.work / name).is_dir():
                Leaves(leaves, True).write(self.work / name)

    def start(self, cell: str) -> Path:
        target = self.work / cell
        if (target / "manifest.json").is_file() or (target / "latest").exists():
            return target
        settings = [f"--set={s}" for s in self.settings]
        if cell == "trained":
            settings.append(f"--set=pretrain.epochs={EPOCHS}")
            call(
                "pretrain",
                APP,
                "--data",
                str(self.work / "train"),
                "--out",
                str(target),
                "--seed",
                str(self.seed),
                *settings,
            )
        elif cell == "features":
            assert self.features is not None
            transfer.transferred(self.features, self.settings).save(target)
        else:
            config = APPLICATION.configure(self.settings)
            arrays = get_arrays(APPLICATION.build_model(config))
            Checkpoint(CheckpointManifest(application=APP, config=to_table(config), stage="untrained"), arrays).save(
                target
            )
        return target

    def head(self, start: Path, data: str, name: str, *, invariant: bool = False) -> Path:
        out = self.work / name
        chosen = ["algorithm.name=statistics_head", "algorithm.evaluate_every=0"]
        chosen += [f"algorithm.head_invariance={INVARIANCE}"] if invariant else []
        settings = [f"--set={s}" for s in (*self.settings, *chosen)]
        call(
            "simulate",
            APP,
            "--from",
            str(start),
            "--rounds",
            "1",
            "--data",
            str(self.work / data),
            "--out",
            str(out),
            "--seed",
            str(self.seed),
            *settings,
        )
        return out

    def evaluated(self, model: Path, data: str) -> dict[str, Any]:
        return call("evaluate", str(model), "--data", str(self.work / data))

    def left_out(self, raw: Leaves, start: Path, cell: str, site: str, *, invariant: bool) -> list[float]:
        """Recall at the site of each class that other sites show, too, by a head that never saw the site."""
        for name, leaves in (
            (f"without-{site}", tuple(x for x in raw.leaves if x.facts.site != site)),
            (
                f"only-{site}",
                tuple(x for x in raw.leaves if x.facts.site == site and x.facts.label in elsewhere(raw, site)),
            ),
        ):
            if not (self.work / name).is_dir():
                Leaves(leaves, True).write(self.work / name)
        if cell == "trained":
            return []  # its features have seen the site
        kind = f"{cell}-invariant" if invariant else cell
        model = self.head(start, f"without-{site}", f"{kind}-without-{site}", invariant=invariant)
        predictions = self.work / f"{kind}-{site}.csv"
        call("evaluate", str(model), "--data", str(self.work / f"only-{site}"), "--predictions", str(predictions))
        with predictions.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        labels = sorted({r["label"] for r in rows})
        return [
            statistics.mean(float(r["prediction"] == label) for r in rows if r["label"] == label) for label in labels
        ]


def _of_client(leaf: Any, client: str) -> Any:
    return replace(leaf, facts=replace(leaf.facts, client=client, site=client))


def elsewhere(raw: Leaves, site: str) -> set[str]:
    return {x.facts.label for x in raw.leaves if x.facts.site != site}


def left_out_sites(raw: Leaves) -> list[str]:
    sites = sorted({x.facts.site for x in raw.leaves if x.facts.site})
    return [s for s in sites if {x.facts.label for x in raw.leaves if x.facts.site == s} & elsewhere(raw, s)]


def judge(seeds: list[Rows]) -> int:
    """Prints each goal, of the best row; 1 where one is missed."""

    rows = [row for row in seeds[0] if " features" in row]  # each with a head from one federated round

    def values(metric: str) -> dict[str, float]:
        return {row: statistics.mean(s[row][metric] for s in seeds) for row in rows if metric in seeds[0][row]}

    goals: dict[str, bool] = {}
    for metric, goal in ((f"mean recall at {SITE}", GOAL_RECALL), ("recall at a site left out", GOAL_LEFT_OUT)):
        if found := values(metric):
            best = max(found.values())
            goals[f"{metric} {best:.4f}, at least {goal}"] = best >= goal
    if rows:
        worst = max(s[row]["federated - pooled head"] for s in seeds for row in rows if INVARIANT not in row)
        goals[f"federated and pooled head differ by {worst:.1e} of the largest weight, at most {GOAL_EQUAL}"] = (
            worst <= GOAL_EQUAL
        )
    if "pooled" in seeds[0]:
        recalls = {
            row: statistics.mean(s[row][f"mean recall at {SITE}"] for s in seeds)
            for row in seeds[0]
            if row.removesuffix(ELSEWHERE) in ("pooled", *GRADIENTS)
        }
        pooled = recalls.pop("pooled")
        for name, recall in recalls.items():
            goals[f"gradients: {name} {recall:.4f}, pooled {pooled:.4f}, at most {MOST_BELOW_POOLED} below"] = (
                pooled - recall <= MOST_BELOW_POOLED
            )
    return verdict(goals)


if __name__ == "__main__":
    sys.exit(main())
