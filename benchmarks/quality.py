"""Quality on clients never trained on: pooled, federated, the bundle that devices run, and the floor; seeds, mean and interval.

One result file per cell (seed, row) in ``runs/benchmarks/quality/APPLICATION-DATA``; a repeated call resumes, and takes up a training that
was interrupted where it stopped. Results of other settings are refused.
Real data where FIELDFLEET_DATA has it, else generated data. The seed changes the held-out clients, generated data and batches.
Where goals are set for generated data, it says which are met; the exit code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from applications.driver_attention.config import VIEWS
from benchmarks import _kept as kept
from benchmarks._goals import verdict
from fieldfleet.evaluate import predict_checkpoint
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import EnvironmentFault, ExitCode, InputError
from fl_core.learning.application import application
from fl_core.learning.partition import split_clients
from fl_core.learning.sources import GENERATED, data_folder, open_data
from fl_core.storage import atomic

RESULTS = Path("runs/benchmarks/quality")
UNSEEN = "unseen_clients"
CENTRE_SHARE = 0.3  # of the training clients
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # Student's t, two-sided 95 %, by degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The metric's mean over the seeds of ``row``, less that of ``above`` on the same seeds where one is given, is to be ``least`` or more."""

    row: str
    least: float
    above: str = ""
    metric: str = "roc_auc"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """rounds: of the federation; presets: further rows, pooled, row -> preset of the application; real: preset for recorded data.

    long_centre: the pretraining before the federation, on CENTRE_SHARE of the clients, makes as many steps as one on all of them,
    instead of as many passes.

    conditions: further rows of the pooled and the federated model, row -> overrides under which it is judged again.
    head: the last layer is then solved for by one round of ``statistics_head`` over the training clients.
    written: generated data are written once a seed, for a generator that takes longer than reading.
    goals: of generated data; recorded ones have benchmarks of their own.
    """

    rounds: int = 20
    long_centre: bool = False
    real: str = "default"
    head: bool = False
    presets: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    written: bool = False
    goals: tuple[Goal, ...] = ()


COLOURS = "colour statistics, nearest neighbours"  # of plant_anomaly's floor
STILL = "data.missing_kinematics=true"


def absent(*views: str) -> str:
    return f"data.missing_views={json.dumps(views)}"


PLANS = {
    "driver_conflict": Plan(rounds=100),
    "driver_attention": Plan(
        rounds=20,
        written=True,
        conditions={
            **{f"without {view}": (absent(view),) for view in VIEWS},
            **{f"{view} alone": (absent(*(v for v in VIEWS if v != view)),) for view in VIEWS},
            **{f"{view} alone, no kinematics": (absent(*(v for v in VIEWS if v != view)), STILL) for view in VIEWS},
            "kinematics alone": (absent(*VIEWS),),
            "without kinematics": (STILL,),
        },
        goals=(
            Goal(row="pooled", least=0.95),
            *(Goal(row=f"pooled, without {view}", least=0.90) for view in VIEWS),
            *(Goal(row="pooled", above=f"pooled, {view} alone, no kinematics", least=0.03) for view in VIEWS),
            *(Goal(row="pooled", above=f"pooled, {view} alone", least=0.03) for view in VIEWS),
            Goal(row="pooled", above="pooled, kinematics alone", least=0.03),
            Goal(row="pooled", above="floor: all, boosted trees", least=0.10),
        ),
    ),
    "plant_disease": Plan(rounds=10),
    "plant_segmentation": Plan(rounds=20),
    "plant_anomaly": Plan(
        rounds=20,
        long_centre=True,
        real="leaves",
        head=True,
        written=True,
        goals=tuple(
            goal
            for metric in ("roc_auc", "pixel_roc_auc")
            for goal in (
                Goal(row="pooled", least=0.95, metric=metric),
                Goal(row="pooled", above=f"floor: {COLOURS}", least=0.10, metric=metric),
            )
        ),
    ),
    "topology_optimisation": Plan(rounds=10, written=True),
    "seismic_facies": Plan(rounds=20, presets={"2-D twin": "twin"}),
}
QUICK = ["toy_regression", "driver_conflict"]
Variants = dict[str, dict[str, Any]]
Rows = dict[str, dict[int, dict[str, Any]]]  # row -> seed -> groups of clients


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--quick", action="store_true", help="one seed, generated toy and driving data, few rounds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--apps", nargs="*", help="default: all, with --quick two of them")
    parser.add_argument(
        "--cells", nargs="*", help="only these: floor, pooled, federated, or a preset's row (default: all)"
    )
    args = parser.parse_args(arguments)
    missed = 0
    for name in args.apps or (QUICK if args.quick else PLANS):
        plan = PLANS.get(name, Plan())
        cells = [c for c in ("floor", "pooled", *plan.presets, "federated") if not args.cells or c in args.cells]
        check_kept(name, plan, quick=args.quick)
        for seed in range(1 if args.quick else args.seeds):
            for cell in cells:
                run_cell(name, cell, seed, plan, quick=args.quick)
        rows = print_table(name, quick=args.quick)
        if not args.quick and data_option(name)[1] == GENERATED:
            missed |= verdict(goals(rows, plan))
    return missed


def check_kept(name: str, plan: Plan, *, quick: bool) -> None:
    """Raises InputError for results kept of an application whose presets were others then."""
    app, folder = application(name), results(name, quick=quick)
    origin = GENERATED if quick else data_option(name)[1]
    presets = {"default" if origin == GENERATED else plan.real, *plan.presets.values()}
    kept.check(folder, {preset: app.configure(preset=preset) for preset in sorted(presets)})


def run_cell(name: str, cell: str, seed: int, plan: Plan, *, quick: bool) -> None:
    """pooled: pretrain on all training clients. federated: pretrain on CENTRE_SHARE of them, federate the rest, export."""
    path = cell_file(name, cell, seed, quick=quick)
    origin = GENERATED if quick else data_option(name)[1]
    preset = plan.presets.get(cell, "default" if origin == GENERATED else plan.real)
    made_by = {"rounds": 5 if quick else plan.rounds}
    if cell == "federated":
        made_by |= centre_settings(name, preset, plan, quick=quick)
    if path.is_file():
        if cell == "federated":
            check_cell(path, made_by)
        return
    data = ["--data", origin]
    if plan.written and origin == GENERATED:
        data = ["--data", str(written(name, path.parent, seed))]
    common = ["--seed", str(seed), *data, "--preset", preset, *(["--set", "pretrain.epochs=2"] if quick else [])]
    work = path.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    if cell == "floor":
        found = floors(name, data[1], seed, preset=preset)
    elif cell == "federated":
        found = federated(name, work, made_by, common, seed, plan)
    else:
        found = pooled(name, work, common, seed, cell, plan)
    document = {"application": name, "seed": seed, **made_by, "data": origin, "variants": found}
    atomic.write_json(path, document)
    shutil.rmtree(work)


def centre_settings(name: str, preset: str, plan: Plan, *, quick: bool) -> dict[str, int]:
    """Passes of the centre's training, where they are not the preset's."""
    if quick or not plan.long_centre:
        return {}
    return {"centre_epochs": round(application(name).configure(preset=preset).pretrain.epochs / CENTRE_SHARE)}


def check_cell(path: Path, made_by: dict[str, int]) -> None:
    """Raises InputError for a federated result that was kept with other rounds or another centre."""
    kept_by = json.loads(path.read_text(encoding="utf-8"))
    for key in ("rounds", "centre_epochs"):
        then, now = (m.get(key, "the preset's") for m in (kept_by, made_by))
        if then != now:
            raise InputError(f"{path} was made with {key} = {then}, which is {now} now", remedy=f"remove {path}")


def pooled(name: str, out: Path, common: list[str], seed: int, row: str, plan: Plan) -> Variants:
    call("pretrain", name, "--out", str(out / "pooled"), *common)
    return judged_under(solved(name, out / "pooled", common, plan), common, seed, row, plan)


def solved(name: str, model: Path, common: list[str], plan: Plan) -> Path:
    """Where the plan says so, the same model with its last layer from the statistics of all training clients."""
    if not plan.head:
        return model
    target = model.with_name(f"{model.name}-head")
    begin = ["--from", str(model), "--rounds", "1", "--set", "algorithm.name=statistics_head"]
    call("simulate", name, *begin, "--out", str(target), *common)
    return target


def federated(name: str, out: Path, made_by: dict[str, int], common: list[str], seed: int, plan: Plan) -> Variants:
    centre_only = ["--set", f"pretrain.client_share={CENTRE_SHARE}"]
    if "centre_epochs" in made_by:
        centre_only += ["--set", f"pretrain.epochs={made_by['centre_epochs']}"]
    call("pretrain", name, "--out", str(out / "centre"), *common, *centre_only)
    begin = ["--from", str(out / "centre"), "--rounds", str(made_by["rounds"])]
    call("simulate", name, *begin, "--out", str(out / "global"), *common)
    centre, final = (solved(name, out / m, common, plan) for m in ("centre", "global"))
    if not (out / "bundle").is_dir():  # it is there as a whole, or not at all
        call("export", str(final), "--out", str(out / "bundle"))
    found = {"centre only": judged(centre, common, seed), "on the device": judged(out / "bundle", common, seed)}
    return found | judged_under(final, common, seed, "federated", plan)


def written(name: str, results: Path, seed: int) -> Path:
    """The folder of this seed's generated data, made on first use."""
    folder = results / f"data-{seed}"
    if not folder.is_dir():
        print(f"  data of {name}, seed {seed}", file=sys.stderr, flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        app = application(name)
        app.generate(app.configure(), seed).write(folder)
    return folder


def judged_under(model: Path, common: list[str], seed: int, row: str, plan: Plan) -> Variants:
    """The model as it is, and under each of the plan's conditions, on the clients that it never saw."""
    found = {row: judged(model, common, seed)}
    if not plan.conditions:
        return found
    loaded = checkpoints.load(model)
    app = application(loaded.manifest.application)
    config = app.configure_from(loaded.manifest.config, origin=str(model))
    raw = open_data(app, config, common[common.index("--data") + 1], seed=seed).raw
    raw = raw.select(set(raw.client_ids()) - set(loaded.manifest.clients_seen))
    for name, overrides in plan.conditions.items():
        config = app.configure_from(loaded.manifest.config, overrides, origin=str(model))
        examples = raw.examples(config)
        outputs = predict_checkpoint(app, config, loaded, examples)
        metrics = app.metrics(config, outputs, examples)
        found[f"{row}, {name}"] = {UNSEEN: {"num_examples": len(examples), "metrics": metrics}}
    return found


def judged(model: Path, common: list[str], seed: int) -> dict[str, Any]:
    """The groups of clients that training never saw."""
    data = common[common.index("--data") : common.index("--data") + 2]
    document = call("evaluate", str(model), *data, "--seed", str(seed))
    return {k: v for k, v in document["groups"].items() if k.endswith(UNSEEN)}


def floors(name: str, data: str, seed: int, *, preset: str = "default") -> Variants:
    """The application's classical methods, on the clients that every other row is trained and judged on."""
    app = application(name)
    method, config = app.floor_function(), app.configure(preset=preset)
    if method is None:
        return {}
    print(f"  floor of {name}, seed {seed}", file=sys.stderr, flush=True)
    examples = open_data(app, config, data, seed=seed).raw.examples(config)
    clients, held = split_clients(examples.clients(), config.data.holdout_fraction, seed)
    test = examples.of_clients(held)
    rows = method(config, examples.of_clients(clients), test, seed=seed)
    return {
        f"floor: {row}": {UNSEEN: {"num_examples": len(test), "metrics": app.metrics(config, outputs, test)}}
        for row, outputs in rows.items()
    }


def data_option(name: str) -> list[str]:
    folder = data_folder(application(name), None)
    return ["--data", str(folder) if folder else GENERATED]


def results(name: str, *, quick: bool) -> Path:
    return RESULTS / f"{name}-{'quick' if quick else Path(data_option(name)[1]).name}"


def cell_file(name: str, cell: str, seed: int, *, quick: bool) -> Path:
    return results(name, quick=quick) / f"{cell.replace(' ', '_')}-{seed}.json"


def call(*arguments: str) -> dict[str, Any]:
    """What ``fieldfleet ... --json`` prints. Raises FieldfleetError where it ends with another exit code than 0."""
    print("  fieldfleet", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "fieldfleet", *arguments, "--json"], stdout=subprocess.PIPE)
    if done.returncode:
        kind = InputError if done.returncode == ExitCode.WRONG_INPUT else EnvironmentFault
        raise kind(f"fieldfleet {arguments[0]} ended with {done.returncode}", remedy="its own message stands above")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def goals(rows: Rows, plan: Plan) -> dict[str, bool]:
    """What is asked -> whether it is met, of the rows that there are, over the seeds that they share."""
    found = {}
    for goal in plan.goals:
        one, other = rows.get(goal.row, {}), rows.get(goal.above, {})
        seeds = sorted(one.keys() & other.keys() if goal.above else one)
        if seeds:
            values = [
                one[s][UNSEEN]["metrics"][goal.metric]
                - (other[s][UNSEEN]["metrics"][goal.metric] if goal.above else 0.0)
                for s in seeds
            ]
            value = statistics.mean(values)
            less = f" less {goal.above}" if goal.above else ""
            found[f"{goal.metric} of {goal.row}{less} {value:.4f}, at least {goal.least}, {len(seeds)} seeds"] = (
                value >= goal.least
            )
    return found


def print_table(name: str, *, quick: bool) -> Rows:
    files = sorted(results(name, quick=quick).glob("*-*.json"))
    cells = [json.loads(f.read_text()) for f in files]
    print(f"{name} on {cells[0]['data']}, {cells[0]['rounds']} rounds; mean ± half of the 95 % interval over the seeds")
    rows: Rows = {}
    for cell in cells:
        for variant, groups in cell["variants"].items():
            rows.setdefault(variant, {})[cell["seed"]] = groups
    for group in dict.fromkeys(g for seeds in rows.values() for found in seeds.values() for g in found):
        for variant, seeds in rows.items():
            found = [s[group] for s in seeds.values() if group in s]
            if not found:  # judged on all unseen clients alone, or every client of this group was trained on
                continue
            values = {m: [f["metrics"][m] for f in found if m in f["metrics"]] for m in found[0]["metrics"]}
            print(
                f"  {group:28} {variant:34} n={found[0]['num_examples']:6} seeds={len(found)}  "
                + "  ".join(f"{m} {interval(v)}" for m, v in values.items())
            )
    return rows


def interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = T_975.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


if __name__ == "__main__":
    sys.exit(main())
