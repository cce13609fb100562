"""Large batches: steps and seconds to the validation loss that tuned AdamW reaches at batch 32 after 10 epochs.

    python -m benchmarks optimizers [--apps APP ...] [--seeds 3] [--first-seed 0] [--data DIR] [--out DIR] [--quick]

The large batch is an eighth of the training set. Every optimiser gets the same budget: eight settings, tried with a seed of
their own (another split into training and validation, another order), each no longer than the best one so far took; where none
reaches the target, the one with the lowest loss counts as the best. It then runs with every judged seed, whose target is
AdamW's at batch 32 with that same seed. The validation loss is looked
at after every second step; a run that has not reached the target within --epochs has not reached it. One result file per run
under ``runs/benchmarks/optimizers``; a repeated call resumes. Seconds are processor time of the training steps on one thread,
input included, evaluations left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fl_core.learning.application import Application, application
from fl_core.learning.sources import GENERATED, FoundData, open_data
from fl_core.report import charts
from fl_core.storage import atomic
from hpc_trainer.commands import training_data
from hpc_trainer.processes import Processes
from hpc_trainer.trainer import Trainer, TrainingData

RESULTS = Path("runs/benchmarks/optimizers")
SMALL_BATCH, SMALL_EPOCHS, PARTS = 32, 10, 8
SETTINGS = 8
TUNING_SEED = 100  # never a judged one
LOOK_EVERY = 2  # steps between two evaluations
FIRST_ORDER, SECOND_ORDER = ("sgd", "adamw", "lamb"), ("soap", "kfac")
# Small enough that the whole table takes minutes, large enough that a curve has a shape.
SIZES: dict[str, list[str]] = {
    "driver_conflict": ["data.clients=24", "data.events_per_client=6", "model.width=32"],
    "plant_anomaly": ["data.clients=20", "data.image_size=16", "model.width=8", "data.rotate=0", "data.colour=0.1"],
    "toy_regression": ["model.hidden=32", "model.norm=none", "data.examples_per_client=128"],
}
COMMON = ["pretrain.average_last=0", "optimizer.weight_decay=0.01", "optimizer.clip_norm=0"]


Setting = dict[str, float | str]  # keys of [optimizer], and epochs: over how many the learning rate falls

SMALL_RATES = [(lr, 0.01) for lr in (0.002, 0.005, 0.01, 0.02, 0.04, 0.08)] + [(0.01, 0.1), (0.02, 0.1)]  # weight decay
LENGTHS = {  # of a step
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": (0.02, 0.04, 0.08, 0.16),
    "lamb": (0.003, 0.01, 0.03, 0.1),
    "soap": (0.005, 0.01, 0.04, 0.15),
}


def grid(name: str) -> list[Setting]:
    """Eight settings of each optimiser: four lengths of a step, and over how many epochs the learning rate falls.

    K-FAC bounds its steps by what they change: four with momentum and rare measurements, the length of a step falling as the
    learning rate, and four that measure and decompose at every step and go as far as the bound allows.
    """
    if name != "kfac":
        return [{"lr": value, "epochs": epochs} for value in LENGTHS[name] for epochs in (10, 20)]
    rare: Setting = {
        "damping": 0.003,
        "momentum": 0.9,
        "kl_clip": 0.001,
        "decay": 0.9,
        "update_every": 5,
        "measure_every": 5,
    }
    fresh: Setting = {"lr": 1.0, "momentum": 0.0, "damping": 0.03, "decay": 0.7, "update_every": 1, "fisher": "sampled"}
    settings = [{**rare, "lr": lr, "epochs": epochs} for lr in (0.005, 0.01) for epochs in (6, 8)]
    return settings + [{**fresh, "kl_clip": clip, "epochs": epochs} for clip in (1.0, 3.0) for epochs in (4, 5)]


BASE = {  # what is not tuned
    "sgd": ["optimizer.momentum=0.9"],
    "adamw": [],
    "lamb": [],
    "soap": ["optimizer.max_factor=512", "optimizer.update_every=5"],
    "kfac": ["optimizer.max_factor=160"],
}


class Reached(Exception):
    pass


@dataclass(frozen=True)
class Task:
    app: Application
    found: FoundData
    folder: Path
    longest: int  # epochs
    quick: bool

    def overrides(self, *more: str) -> list[str]:
        return [*SIZES[self.app.name], *COMMON, *more]


def run(
    task: Task, overrides: list[str], *, batch: int, epochs: int, seed: int, target: float | None, limit: int
) -> dict[str, Any]:
    """Train; validation loss after every step until the target is reached, else after the last one."""
    config = task.app.configure(
        task.overrides(
            *overrides,
            f"pretrain.batch_size={batch}",
            f"pretrain.epochs={epochs}",
            f"pretrain.checkpoint_every={epochs}",
        )
    )
    data = training_data(task.app, config, task.found, seed)
    torch.manual_seed(seed)
    curve: list[float] = []
    seconds, began = 0.0, 0.0

    def on_step(step: int, total: int, loss: float) -> None:
        nonlocal seconds, began
        seconds += time.process_time() - began
        if target is not None and step % LOOK_EVERY == 0:
            curve.append(trainer.evaluate(data.validation).get("loss", float("inf")))
            if curve[-1] <= target or step >= limit:
                raise Reached
        began = time.process_time()

    with tempfile.TemporaryDirectory() as out:
        alone = Processes(0, 1, torch.device("cpu"))
        unseen = TrainingData(train=data.train, validation=data.validation.take([]), clients=data.clients)
        trainer = Trainer(task.app, config, unseen, processes=alone, out=Path(out), seed=seed, on_step=on_step)
        began = time.process_time()
        try:
            trainer.run()
            diverged = False
        except Reached:
            diverged = False
        except (ArithmeticError, ValueError, RuntimeError, OSError) as error:
            print(f"    {error}", file=sys.stderr)
            diverged = True
        except Exception as error:  # IntegrityError: the loss is not finite
            print(f"    {str(error).splitlines()[0]}", file=sys.stderr)
            diverged = True
        loss = float("inf") if diverged else trainer.evaluate(data.validation).get("loss", float("inf"))
    reached = target is not None and bool(curve) and curve[-1] <= target
    return {
        "loss": loss if loss < float("inf") else None,
        "steps": len(trainer.losses),
        "seconds": seconds,
        "reached": reached,
        "curve": [c if c < float("inf") else None for c in curve],
        "examples": len(data.train),
        "validation": len(data.validation),
    }


def cell(task: Task, key: str, **options: Any) -> dict[str, Any]:
    """One run, once: its file is its result, as long as it was made with these options."""
    path = task.folder / f"{task.app.name}-{key}.json"
    asked = json.loads(json.dumps({**options, "sizes": task.overrides()}))
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["options"] == asked:
            return known
    began = time.perf_counter()
    found = run(task, **options)
    atomic.write_json(path, {"options": asked, **found})
    outcome = f"{'reached' if found['reached'] else 'loss'} {found['loss']}"
    print(
        f"  {path.stem}: {found['steps']} steps, {found['seconds']:.1f} s, {outcome} ({time.perf_counter() - began:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def settings_of(setting: Setting) -> list[str]:
    return [f"optimizer.{name}={value}" for name, value in setting.items() if name != "epochs"]


def targets_of(task: Task, seeds: Sequence[int]) -> tuple[dict[int, float], dict[str, Any]]:
    """Seed -> the validation loss of AdamW, tuned with the tuning seed, after 10 epochs at batch 32."""
    epochs = 2 if task.quick else SMALL_EPOCHS
    tried = SMALL_RATES[: 2 if task.quick else SETTINGS]

    def one(number: int, seed: int) -> dict[str, Any]:
        lr, decay = tried[number]
        overrides = ["optimizer.name=adamw", f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}"]
        return cell(
            task, f"target-{number}-{seed}", overrides=overrides, batch=SMALL_BATCH, epochs=epochs, seed=seed,
            target=None, limit=0,
        )  # fmt: skip

    best = min(range(len(tried)), key=lambda n: one(n, TUNING_SEED)["loss"] or float("inf"))
    runs = {seed: one(best, seed) for seed in (TUNING_SEED, *seeds)}
    judged_runs = [runs[seed] for seed in seeds]
    return {seed: r["loss"] for seed, r in runs.items()}, {
        "setting": dict(zip(("lr", "weight_decay"), tried[best], strict=True)),
        "losses": [r["loss"] for r in judged_runs],
        "steps": statistics.median(r["steps"] for r in judged_runs),
        "seconds": statistics.median(r["seconds"] for r in judged_runs),
        "examples": [r["examples"] for r in judged_runs],
        "validation": [r["validation"] for r in judged_runs],
        "batches": {seed: -(-r["examples"] // PARTS) for seed, r in runs.items()},
    }


def judged(
    task: Task, name: str, targets: dict[int, float], batches: dict[int, int], seeds: Sequence[int]
) -> dict[str, Any]:
    settings = grid(name)
    if not task.app.sample:  # says not how its model draws targets
        settings = [{k: v for k, v in s.items() if k != "fisher"} for s in settings]
    assert len(settings) == SETTINGS
    settings = settings[: 2 if task.quick else SETTINGS]
    limit = best_limit = task.longest * PARTS

    def one(number: int, seed: int, limit: int) -> dict[str, Any]:
        setting = settings[number]
        epochs = min(int(setting.get("epochs", task.longest)), task.longest)
        return cell(
            task, f"{name}-{number}-{seed}", overrides=[f"optimizer.name={name}", *BASE[name], *settings_of(setting)],
            batch=batches[seed], epochs=epochs, seed=seed, target=targets[seed], limit=limit,
        )  # fmt: skip

    best, seconds, lowest = -1, float("inf"), (float("inf"), 0)
    for number in range(len(settings)):
        found = one(number, TUNING_SEED, best_limit)
        lowest = min(lowest, (found["loss"] or float("inf"), number))
        if found["reached"] and (found["steps"], found["seconds"]) < (best_limit, seconds):
            best, best_limit, seconds = number, found["steps"], found["seconds"]
    chosen = best if best >= 0 else lowest[1]
    return {"setting": settings[chosen], "runs": [one(chosen, seed, limit) for seed in seeds]}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Median steps and seconds of the seeds, a run that did not reach the target counted as endless; None: so is the median."""
    table: dict[str, dict[str, float | int | None]] = {}
    for name, found in results.items():
        runs = found["runs"]
        table[name] = {
            "steps": _median(runs, "steps"),
            "seconds": _median(runs, "seconds"),
            "ms_a_step": 1e3 * statistics.median(r["seconds"] / r["steps"] for r in runs) if runs else None,
            "reached": sum(r["reached"] for r in runs),
            "tried": max((r["steps"] for r in runs), default=0),
        }
    return table


def _median(runs: list[dict[str, Any]], what: str) -> float | None:
    found = statistics.median(r[what] if r["reached"] else float("inf") for r in runs) if runs else float("inf")
    return found if found < float("inf") else None


def verdict(table: dict[str, dict[str, Any]]) -> str:
    """The second-order optimiser with the smallest share of the steps of the best first-order one; the goal is its alone."""
    first = [(table[n]["steps"], n) for n in FIRST_ORDER if table[n]["steps"]]
    quick = [(table[n]["seconds"], n) for n in FIRST_ORDER if table[n]["seconds"]]
    second = [(table[n]["steps"], n) for n in SECOND_ORDER if table[n]["steps"]]
    if not second:
        return "no second-order optimiser reached the target: goal missed"
    if not first:
        most = max(table[n]["tried"] for n in FIRST_ORDER)
        met = "met" if min(second)[0] <= 0.5 * most else "open"
        return f"{min(second)[1]}: {min(second)[0]:.0f} steps; no first-order optimiser reached the target in {most}: goal (at most 0.50) {met}"
    shares = [(steps / min(first)[0], table[n]["seconds"] / min(quick)[0], n) for steps, n in second]
    share, time_share, name = min(shares, key=lambda found: (not _met(*found[:2]), found[0]))
    met = "met" if _met(share, time_share) else "missed"
    return (
        f"{name} takes {share:.2f} of the steps of {min(first)[1]} and {time_share:.2f} of the time of {min(quick)[1]}: "
        f"goal (at most 0.50, below 1) {met}"
    )


def _met(share: float, time_share: float) -> bool:
    return share <= 0.5 and time_share < 1


def picture(app: str, results: dict[str, dict[str, Any]], target: float, path: Path) -> None:
    series = {}
    for name, found in results.items():
        if found["runs"]:
            curve = [c if c is not None else float("nan") for c in found["runs"][0]["curve"]]
            series[name] = ([LOOK_EVERY * (n + 1) for n in range(len(curve))], curve)
    longest = max((x[-1] for x, _ in series.values()), default=1)
    series["target"] = ([1, longest], [target, target])
    atomic.write_bytes(
        path, charts.lines(series, x_label="steps", y_label="validation loss", title=f"{app}: batch of an eighth")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--apps", nargs="*", default=["driver_conflict", "plant_anomaly"], choices=sorted(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="the judged seeds are this one and those that follow")
    parser.add_argument("--epochs", type=int, default=20, help="after which a large-batch run is given up")
    parser.add_argument("--data", help="folder of the data set, with one --apps (default: as every command finds it)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the toy application, two settings, one seed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.quick:
        args.apps, args.seeds, args.epochs, args.data = ["toy_regression"], 1, 6, GENERATED
    document: dict[str, Any] = {}
    for name in args.apps:
        app = application(name)
        task = Task(app, None, args.out / ("quick" if args.quick else "full"), args.epochs, args.quick)  # type: ignore[arg-type]
        task = replace(task, found=open_data(app, app.configure(task.overrides()), args.data, seed=0))
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        if TUNING_SEED in seeds:
            parser.error(f"seed {TUNING_SEED} chooses the settings and is not judged")
        targets, small = targets_of(task, seeds)
        results = {n: judged(task, n, targets, small["batches"], seeds) for n in (*FIRST_ORDER, *SECOND_ORDER)}
        table = summary(results)
        picture(name, results, targets[seeds[0]], task.folder / f"{name}.png")
        document[name] = {"targets": targets, "small": small, "table": table, "verdict": verdict(table)}
        document[name]["settings"] = {n: r["setting"] for n, r in results.items()}
        if not args.json:
            show(name, task.found.origin, document[name], args.seeds)
    if args.json:
        print(json.dumps(document, indent=2))
    return 0


def show(name: str, origin: str, found: dict[str, Any], seeds: int) -> None:
    small = found["small"]
    print(
        f"{name} on {origin}: {_span(small['examples'])} training and {_span(small['validation'])} validation examples; targets "
        f"{', '.join(f'{loss:.4f}' for loss in small['losses'])} = AdamW {small['setting']} at batch {SMALL_BATCH} in "
        f"{small['steps']:.0f} steps, {small['seconds']:.1f} s; large batch an eighth; {seeds} seeds, medians"
    )
    for optimizer, row in found["table"].items():
        steps = f"{row['steps']:6.0f} steps {row['seconds']:7.1f} s" if row["steps"] else "    not reached      "
        step = f"{row['ms_a_step']:7.0f} ms a step" if row["ms_a_step"] else ""
        print(f"  {optimizer:8} {steps} {step}  {row['reached']}/{seeds} seeds  {found['settings'][optimizer]}")
    print(f"  {found['verdict']}")


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
