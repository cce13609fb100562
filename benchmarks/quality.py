"""Quality on clients never trained on: pooled, federated, and the bundle that devices run; seeds, mean and interval.

One result file per cell (application, data, variant, seed) under ``runs/benchmarks/quality``; a repeated call resumes.
Real data where FIELDFLEET_DATA has it, else generated data. The seed changes the held-out clients and the initial model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl_core.learning.application import application
from fl_core.learning.sources import data_folder
from fl_core.storage import atomic

RESULTS = Path("runs/benchmarks/quality")
ROUNDS = {"driver_conflict": 100, "plant_disease": 10, "toy_regression": 20}
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # Student's t, two-sided 95 %, by degrees of freedom


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--quick", action="store_true", help="one seed, generated toy and driving data, few rounds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--apps", nargs="*", default=["driver_conflict", "plant_disease"])
    args = parser.parse_args(arguments)
    apps = ["toy_regression", "driver_conflict"] if args.quick else args.apps
    for name in apps:
        for seed in range(1 if args.quick else args.seeds):
            run_cell(name, seed, quick=args.quick)
        print_table(name, quick=args.quick)
    return 0


def run_cell(name: str, seed: int, *, quick: bool) -> None:
    """pretrain on all training clients (pooled); pretrain on 30 % of them, federate the rest, export, evaluate."""
    path = cell_file(name, seed, quick=quick)
    if path.is_file():
        return
    data = ["--data", "generated"] if quick else data_option(name)
    rounds = 5 if quick else ROUNDS.get(name, 20)
    settings = ["--set", "pretrain.epochs=2"] if quick else []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        common = ["--seed", str(seed), *data, *settings]
        pooled = call("pretrain", name, "--out", str(out / "pooled"), *common)
        call("pretrain", name, "--out", str(out / "centre"), *common, "--set", "pretrain.client_share=0.3")
        call(
            "simulate",
            name,
            "--from",
            str(out / "centre"),
            "--rounds",
            str(rounds),
            "--out",
            str(out / "global"),
            *common,
        )
        call("export", str(out / "global"), "--out", str(out / "bundle"))
        found = {
            variant: unseen(call("evaluate", str(out / folder), *data, "--seed", str(seed)))
            for variant, folder in (
                ("pooled", "pooled"),
                ("centre only", "centre"),
                ("federated", "global"),
                ("on the device", "bundle"),
            )
        }
    atomic.write_json(
        path, {"application": name, "seed": seed, "rounds": rounds, "data": pooled["data"], "variants": found}
    )


def unseen(document: dict[str, Any]) -> dict[str, Any]:
    """The groups of clients that training never saw."""
    return {k: v for k, v in document["groups"].items() if k.endswith("unseen_clients")}


def data_option(name: str) -> list[str]:
    folder = data_folder(application(name), None)
    return ["--data", str(folder) if folder else "generated"]


def cell_file(name: str, seed: int, *, quick: bool) -> Path:
    kind = "quick" if quick else Path(data_option(name)[1]).name
    return RESULTS / f"{name}-{kind}-{seed}.json"


def call(*arguments: str) -> dict[str, Any]:
    print("  fieldfleet", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "fieldfleet", *arguments, "--json"], stdout=subprocess.PIPE, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def print_table(name: str, *, quick: bool) -> None:
    files = sorted(RESULTS.glob(f"{cell_file(name, 0, quick=quick).name.removesuffix('0.json')}*.json"))
    cells = [json.loads(f.read_text()) for f in files]
    print(
        f"{name} on {cells[0]['data']}, {len(cells)} seeds, {cells[0]['rounds']} rounds; mean ± half of the 95 % interval"
    )
    groups = dict.fromkeys(g for c in cells for v in c["variants"].values() for g in v)
    for group in groups:
        for variant in cells[0]["variants"]:
            found = [c["variants"][variant][group] for c in cells if group in c["variants"][variant]]
            if not found:  # every client of this group was trained on
                print(f"  {group:28} {variant:14} none unseen")
                continue
            metrics = found[0]["metrics"]
            values = {m: [f["metrics"][m] for f in found if m in f["metrics"]] for m in metrics}
            print(
                f"  {group:28} {variant:14} n={found[0]['num_examples']:6}  "
                + "  ".join(f"{m} {interval(v)}" for m, v in values.items())
            )


def interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = T_975.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


if __name__ == "__main__":
    sys.exit(main())
