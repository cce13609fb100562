"""driver_conflict on vehicles never trained on: folds over vehicles that never split a driver, seeds, mean and interval.

    python -m benchmarks.driver_conflict [DATA] [--folds 5] [--seeds 3] [--rounds 150] [--variants floor pooled ...] [--json] [--quick]

The tuned variants start from a model of generated drives, which no recorded drive went into.

DATA: default $FIELDFLEET_DATA/driving_100car, else generated drives.
Every model is made by the fieldfleet commands with the default preset on all events of all folds but one (nothing is chosen on
validation data, so none are kept back) and scores that one; the scores of all folds are judged together. One file per (data, variant, seed, fold) under ``runs/benchmarks/driver_conflict``: a repeated call resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from applications.driver_conflict import APPLICATION
from applications.driver_conflict.data import Drives
from benchmarks.quality import call, interval
from fieldfleet.evaluate import predict_checkpoint
from fl_core.contracts import checkpoint as checkpoints
from fl_core.learning.examples import Examples
from fl_core.learning.sources import GENERATED, open_data
from fl_core.storage import archive, atomic

RESULTS = Path("runs/benchmarks/driver_conflict")
VARIANTS = ("floor", "pooled", "federated", "pooled-tuned", "federated-tuned")
BEFORE = ("data.clients=150", "pretrain.epochs=6")  # of the generated drives that a tuned model has seen first
SILENT = ("front_radar", "rear_radar", "acceleration", "yaw")  # sensors without which the pooled model is judged again
WHOLE = ("--set", "data.holdout_fraction=0.0", "--set", "data.validation_fraction=0.0")
Outputs = dict[str, np.ndarray[Any, Any]]


def folds(raw: Drives, count: int) -> list[list[str]]:
    """Vehicles in ``count`` parts of about equally many events; vehicles that share an identified driver stay together."""
    root = {client: client for client in raw.client_ids()}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    first: dict[str, str] = {}
    for event in raw.events:
        driver = event.facts.get("subject_id", "0")
        if event.client in root and driver != "0":
            root[find(event.client)] = find(first.setdefault(driver, event.client))
    together: dict[str, list[str]] = {}
    for client in root:
        together.setdefault(find(client), []).append(client)
    events = {c: sum(e.client == c and e.usable for e in raw.events) for c in root}
    parts: list[list[str]] = [[] for _ in range(count)]
    for clients in sorted(together.values(), key=lambda cs: (-sum(events[c] for c in cs), cs)):
        min(parts, key=lambda p: sum(events[c] for c in p)).extend(clients)
    return parts


class Bench:
    """raw: the whole data set; parts: its folds."""

    def __init__(self, raw: Drives, args: argparse.Namespace, kind: str) -> None:
        self.raw, self.args, self.parts = raw, args, folds(raw, args.folds)
        self.settings = [part for s in args.set for part in ("--set", s)]
        self.name = f"{kind}-{args.label}" if args.label else kind
        self.config = APPLICATION.configure(["data.training_hop=15"])

    def held(self, fold: int, missing: str = "") -> Examples:
        config = (
            APPLICATION.configure(["data.training_hop=15", f'data.missing_sensors=["{missing}"]'])
            if missing
            else self.config
        )
        return self.raw.select(self.parts[fold]).examples(config)

    def scored(self, variant: str, seed: int, fold: int) -> Outputs:
        """Outputs of this variant's model of one fold on the vehicles that it never saw; ``ROW/NAME`` under other conditions."""
        rounds = f"-{self.args.rounds}" if variant.startswith("federated") else ""
        path = RESULTS / f"{self.name}-{variant}{rounds}-{seed}-{fold}of{self.args.folds}.npz"
        if not path.is_file():
            print(f"  {variant}, seed {seed}, fold {fold + 1}/{self.args.folds}", file=sys.stderr, flush=True)
            found = self.floor(seed, fold) if variant == "floor" else self.trained(variant, seed, fold, path)
            with atomic.new_folder(path.with_suffix(".new")) as folder:
                np.savez(folder / "outputs.npz", **found)
            (path.with_suffix(".new") / "outputs.npz").replace(path)
            path.with_suffix(".new").rmdir()
        return dict(archive.read_npz(path))

    def train_data(self, fold: int) -> Drives:
        return self.raw.select(set(self.raw.client_ids()) - set(self.parts[fold]))

    def floor(self, seed: int, fold: int) -> Outputs:
        method = APPLICATION.floor_function()
        assert method is not None
        return next(
            iter(method(self.config, self.train_data(fold).examples(self.config), self.held(fold), seed=seed).values())
        )

    def trained(self, variant: str, seed: int, fold: int, path: Path) -> Outputs:
        data, out = RESULTS / f"{self.name}-{fold}of{self.args.folds}", path.with_suffix("")
        if not data.is_dir():
            self.train_data(fold).write(data)
        common = [*("--data", str(data), "--seed", str(seed), "--out", str(out)), *WHOLE, *self.settings]
        if variant.endswith("-tuned"):
            common += ["--from", str(self.before(seed))]
        if variant.startswith("pooled"):
            call("pretrain", "driver_conflict", *common)
        else:
            call(
                *("simulate", "driver_conflict", "--rounds", str(self.args.rounds), *common),
                *("--set", "algorithm.evaluate_every=0"),
            )
        loaded = checkpoints.load(out)
        config = APPLICATION.configure_from(loaded.manifest.config, origin=str(out))
        found = dict(predict_checkpoint(APPLICATION, config, loaded, self.held(fold)))
        if variant.startswith("pooled"):
            for sensor in SILENT:
                for name, values in predict_checkpoint(APPLICATION, config, loaded, self.held(fold, sensor)).items():
                    found[f"without {sensor}/{name}"] = values
        return found

    def before(self, seed: int) -> Path:
        """A model of generated drives alone."""
        out = RESULTS / f"{self.name}-before-{seed}"
        if not (out / "final").is_dir():
            settings = [part for s in BEFORE for part in ("--set", s)]
            call(
                *("pretrain", "driver_conflict", "--data", GENERATED, "--seed", str(seed), "--out", str(out)),
                *(*WHOLE, *settings, *self.settings),
            )
        return out

    def metrics(self, variant: str, seed: int) -> dict[str, dict[str, float]]:
        """Row -> metrics over all folds."""
        outputs = [self.scored(variant, seed, fold) for fold in range(self.args.folds)]
        together = {name: np.concatenate([o[name] for o in outputs]) for name in outputs[0]}
        parts = [self.held(fold) for fold in range(self.args.folds)]
        examples = Examples(
            {}, np.concatenate([p.targets for p in parts]),
            {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
        )  # fmt: skip
        masks = {"all": np.ones(len(examples), bool), **APPLICATION.groups(self.config, examples)}
        rows = {}
        for row in dict.fromkeys(name.rpartition("/")[0] for name in together):
            mine = {name.rpartition("/")[2]: v for name, v in together.items() if name.rpartition("/")[0] == row}
            for group, mask in masks.items():
                if not row or group == "all":
                    part = {name: v[mask] for name, v in mine.items()}
                    rows[row or group] = APPLICATION.metrics(self.config, part, examples.take(mask))
        return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.driver_conflict", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("data", nargs="?")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for training")
    parser.add_argument("--label", default="", help="keeps the results of other settings apart")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two folds, one seed, five rounds, generated drives")
    args = parser.parse_args(arguments)
    if args.set and not args.label:
        parser.error("--set needs a --label for its results")
    if args.quick:
        args.data, args.folds, args.rounds, args.seeds = GENERATED, 2, 5, 1
        args.set, args.label = ["pretrain.epochs=2", "data.clients=8"], "quick"
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = open_data(APPLICATION, APPLICATION.configure(args.set), args.data, seed=0)
    bench = Bench(cast("Drives", found.raw), args, Path(found.origin).name if found.path else GENERATED)
    print(
        f"driver_conflict on {found.origin}, {args.folds} folds, {args.seeds} seeds, {args.rounds} rounds; mean ± half of the 95 % interval"
    )
    document = {}
    for variant in args.variants:
        seeds = [bench.metrics(variant, seed) for seed in range(args.seeds)]
        document[variant] = seeds
        for row, first in seeds[0].items():
            values = {name: interval([s[row][name] for s in seeds]) for name in first}
            print(
                f"{variant:10} {row:22} " + "  ".join(f"{name} {value}" for name, value in values.items()), flush=True
            )
    if args.json:
        print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
