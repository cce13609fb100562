"""driver_conflict on vehicles never trained on: pooled and federated, by folds over vehicles that never split a driver.

    python -m benchmarks.driver_conflict [DATA] [--folds 5] [--rounds 60] [--seed 0] [--json] [--quick]

DATA: default $FIELDFLEET_DATA/driving_100car, else generated drives.
Every model is made and judged by the fieldfleet commands with the default preset; the scores of all folds are pooled.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from applications.driver_conflict import APPLICATION
from applications.driver_conflict.data import Drives
from fl_core.learning.sources import GENERATED, open_data
from fl_core.runtime import scores

HISTORY_ROWS = 100  # windows with 10 s of history: further from a record's start than any model can see


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


def fieldfleet(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fieldfleet", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fieldfleet {arguments[0]} ended with {done.returncode}:\n{done.stderr}")


def judged(model: Path, data: Path) -> list[dict[str, str]]:
    table = model.with_suffix(".csv")
    fieldfleet("evaluate", str(model), "--data", str(data), "--predictions", str(table), "--json")
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(rows: list[dict[str, str]]) -> dict[str, float]:
    truth = np.array([int(r["label"]) for r in rows])
    score = np.array([float(r["score"]) for r in rows])
    parts = {
        "all": np.ones(len(rows), bool),
        "full_context": np.array([r["full_context"] == "True" for r in rows]),
        "10 s of history": np.array([int(r["end_row"]) >= HISTORY_ROWS for r in rows]),
    }
    result: dict[str, float] = {}
    for name, mask in parts.items():
        for metric in (scores.roc_auc, scores.average_precision):
            value = metric(truth[mask], score[mask])
            result[f"{name} {metric.__name__}"] = round(value or 0.0, 4)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.driver_conflict", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("data", nargs="?")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two folds, five rounds, generated drives")
    args = parser.parse_args(arguments)
    if args.quick:
        args.data, args.folds, args.rounds = GENERATED, 2, 5
    found = open_data(APPLICATION, APPLICATION.configure(), args.data, seed=args.seed)
    raw = cast("Drives", found.raw)
    print(f"driver_conflict on {found.origin}, {args.folds} folds, {args.rounds} rounds")
    parts = folds(raw, args.folds)
    rows: dict[str, list[dict[str, str]]] = {"pooled": [], "federated": []}
    with tempfile.TemporaryDirectory() as name:
        for number, held in enumerate(parts):
            folder = Path(name) / str(number)
            raw.select(set(raw.client_ids()) - set(held)).write(folder / "train")
            raw.select(held).write(folder / "held")
            common = ["--data", str(folder / "train"), "--seed", str(args.seed), "--set", "data.holdout_fraction=0.0"]
            fieldfleet("pretrain", "driver_conflict", "--out", str(folder / "pooled"), *common)
            fieldfleet(
                *("simulate", "driver_conflict", "--out", str(folder / "federated")),
                *("--rounds", str(args.rounds), "--set", "algorithm.evaluate_every=0", *common),
            )
            for kind in rows:
                rows[kind] += judged(folder / kind, folder / "held")
            print(f"fold {number + 1}/{len(parts)}: {len(held)} vehicles", file=sys.stderr, flush=True)
    result = {kind: summary(table) for kind, table in rows.items()}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for name in next(iter(result.values())):
        print(f"{name:40s}" + "".join(f"{kind} {values[name]:.4f}   " for kind, values in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
