"""Large batches: steps and seconds to the validation loss that tuned AdamW reaches at batch 32 after 10 epochs.

    python -m benchmarks.optimizers [--apps APP ...] [--seeds 3] [--data DIR] [--out DIR] [--quick]

The large batch is an eighth of the training set. Every optimiser gets the same budget: eight settings, tried with the first
seed; the best one runs with every seed. A setting that does not reach the target within --epochs counts as not reached.
A run is tried no longer than the best setting so far took. One result file per run under ``runs/benchmarks/optimizers``;
a repeated call resumes. Seconds are processor time of the training steps on one thread, input included, evaluations left out.
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
FIRST_ORDER, SECOND_ORDER = ("sgd", "adamw", "lamb"), ("soap", "kfac")
# Small enough that the whole table takes minutes, large enough that a curve has a shape.
SIZES: dict[str, list[str]] = {
    "driver_conflict": ["data.clients=24", "data.events_per_client=6", "model.width=32"],
    "plant_disease": [
        *("pretrain.client_share=0.2", "data.image_size=32", "model.width=8"),
        *("data.validation_fraction=0.2", "model.label_smoothing=0"),
        *("data.zoom=0.1", "data.rotate=0", "data.background=0", "data.colour=0.1"),
    ],
    "toy_regression": ["model.hidden=16", "model.norm=none", "data.examples_per_client=32"],
}
COMMON = ["pretrain.average_last=0", "optimizer.weight_decay=0.01", "optimizer.clip_norm=0"]


def grid(name: str) -> list[dict[str, float]]:
    """Eight settings of each optimiser: learning rates, and the one other number that matters most for it."""
    rates = {"sgd": (0.03, 0.1, 0.3, 1.0), "adamw": (0.002, 0.005, 0.01, 0.02), "lamb": (0.005, 0.01, 0.03, 0.1)}
    if name in rates:
        settings = [{"lr": lr, "epochs": epochs} for lr in rates[name] for epochs in (12.0, 30.0)]
    elif name == "soap":
        settings = [{"lr": lr, "update_every": every} for lr in (0.005, 0.01, 0.02, 0.04) for every in (2.0, 5.0)]
    else:
        settings = [{"kl_clip": clip, "damping": d} for clip in (0.0003, 0.001) for d in (0.001, 0.003, 0.01, 0.03)]
    assert len(settings) == SETTINGS
    return settings


BASE = {  # what is not tuned
    "sgd": ["optimizer.momentum=0.9"],
    "adamw": [],
    "lamb": [],
    "soap": ["optimizer.max_factor=512"],
    "kfac": [
        *("optimizer.momentum=0.9", "optimizer.update_every=5", "optimizer.max_factor=160"),
        *("optimizer.lr=0.1", "optimizer.decay=0.9"),  # the step is bounded by kl_clip
    ],
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
        if target is not None:
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
    """One run, once: its file is its result."""
    path = task.folder / f"{task.app.name}-{key}.json"
    if not path.is_file():
        began = time.perf_counter()
        found = run(task, **options)
        atomic.write_json(path, {"options": {k: v for k, v in options.items() if k != "task"}, **found})
        outcome = f"{'reached' if found['reached'] else 'loss'} {found['loss']}"
        print(
            f"  {path.stem}: {found['steps']} steps, {found['seconds']:.1f} s, {outcome} ({time.perf_counter() - began:.0f} s)",
            file=sys.stderr,
        )
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def settings_of(setting: dict[str, float]) -> list[str]:
    return [f"optimizer.{k}={int(v) if k == 'update_every' else v}" for k, v in setting.items() if k not in ("epochs",)]


def target_of(task: Task, seeds: int) -> tuple[float, dict[str, Any]]:
    """Tuned AdamW at batch 32: the mean over seeds of its validation loss after 10 epochs."""
    epochs = 2 if task.quick else SMALL_EPOCHS
    rates = (0.0005, 0.001, 0.002, 0.005)
    tried = [(lr, decay) for lr in rates for decay in (0.01, 0.1)][: 2 if task.quick else SETTINGS]

    def one(number: int, seed: int) -> dict[str, Any]:
        lr, decay = tried[number]
        overrides = ["optimizer.name=adamw", f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}"]
        return cell(
            task, f"target-{number}-{seed}", overrides=overrides, batch=SMALL_BATCH, epochs=epochs, seed=seed,
            target=None, limit=0,
        )  # fmt: skip

    best = min(range(len(tried)), key=lambda n: one(n, 0)["loss"] or float("inf"))
    runs = [one(best, seed) for seed in range(seeds)]
    return statistics.mean(r["loss"] for r in runs), {
        "setting": dict(zip(("lr", "weight_decay"), tried[best], strict=True)),
        "losses": [r["loss"] for r in runs],
        "steps": runs[0]["steps"],
        "seconds": statistics.median(r["seconds"] for r in runs),
        "examples": runs[0]["examples"],
    }


def judged(task: Task, name: str, target: float, batch: int, seeds: int) -> dict[str, Any]:
    settings = grid(name)[: 2 if task.quick else SETTINGS]
    limit = best_limit = task.longest * PARTS

    def one(number: int, seed: int, limit: int) -> dict[str, Any]:
        setting = settings[number]
        epochs = min(int(setting.get("epochs", task.longest)), task.longest)
        return cell(
            task, f"{name}-{number}-{seed}", overrides=[f"optimizer.name={name}", *BASE[name], *settings_of(setting)],
            batch=batch, epochs=epochs, seed=seed, target=target, limit=limit,
        )  # fmt: skip

    best, seconds = -1, float("inf")
    for number in range(len(settings)):
        found = one(number, 0, best_limit)
        if found["reached"] and (found["steps"], found["seconds"]) < (best_limit, seconds):
            best, best_limit, seconds = number, found["steps"], found["seconds"]
    if best < 0:
        return {"setting": None, "runs": []}
    return {"setting": settings[best], "runs": [one(best, seed, limit) for seed in range(seeds)]}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Median steps and seconds of the seeds; None where a seed did not reach the target."""
    table: dict[str, dict[str, float | int | None]] = {}
    for name, found in results.items():
        runs = found["runs"]
        done = bool(runs) and all(r["reached"] for r in runs)
        table[name] = {
            "steps": statistics.median(r["steps"] for r in runs) if done else None,
            "seconds": statistics.median(r["seconds"] for r in runs) if done else None,
            "ms_a_step": 1e3 * statistics.median(r["seconds"] / r["steps"] for r in runs) if runs else None,
            "reached": sum(r["reached"] for r in runs),
        }
    return table


def verdict(table: dict[str, dict[str, Any]]) -> str:
    first = [(table[n]["steps"], n) for n in FIRST_ORDER if table[n]["steps"]]
    quick = [(table[n]["seconds"], n) for n in FIRST_ORDER if table[n]["seconds"]]
    second = [(table[n]["steps"], n) for n in SECOND_ORDER if table[n]["steps"]]
    if not second:
        return "no second-order optimiser reached the target: goal missed"
    steps, name = min(second)
    if not first:
        return f"{name}: {steps:.0f} steps; no first-order optimiser reached the target"
    share = steps / min(first)[0]
    time_share = min((table[n]["seconds"], n) for n in SECOND_ORDER if table[n]["seconds"])[0] / min(quick)[0]
    met = "met" if share <= 0.5 and time_share < 1 else "missed"
    return (
        f"{name} takes {share:.2f} of the steps of {min(first)[1]}; the fastest second-order one {time_share:.2f} of the "
        f"time of {min(quick)[1]}: goal (at most 0.50, below 1) {met}"
    )


def picture(app: str, results: dict[str, dict[str, Any]], target: float, path: Path) -> None:
    series = {}
    for name, found in results.items():
        if found["runs"]:
            curve = [c if c is not None else float("nan") for c in found["runs"][0]["curve"]]
            series[name] = (list(range(1, len(curve) + 1)), curve)
    longest = max((len(x) for x, _ in series.values()), default=1)
    series["target"] = ([1, longest], [target, target])
    atomic.write_bytes(
        path, charts.lines(series, x_label="steps", y_label="validation loss", title=f"{app}: batch of an eighth")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--apps", nargs="*", default=["driver_conflict", "plant_disease"], choices=sorted(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30, help="after which a large-batch run is given up")
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
        target, small = target_of(task, args.seeds)
        batch = max(1, -(-small["examples"] // PARTS))
        results = {n: judged(task, n, target, batch, args.seeds) for n in (*FIRST_ORDER, *SECOND_ORDER)}
        table = summary(results)
        picture(name, results, target, task.folder / f"{name}.png")
        document[name] = {"target": target, "small": small, "batch": batch, "table": table, "verdict": verdict(table)}
        document[name]["settings"] = {n: r["setting"] for n, r in results.items()}
        if not args.json:
            show(name, task.found.origin, document[name], args.seeds)
    if args.json:
        print(json.dumps(document, indent=2))
    return 0


def show(name: str, origin: str, found: dict[str, Any], seeds: int) -> None:
    small = found["small"]
    print(
        f"{name} on {origin}: {small['examples']} training examples; target {found['target']:.4f} = AdamW {small['setting']} at "
        f"batch {SMALL_BATCH} in {small['steps']} steps, {small['seconds']:.1f} s; large batch {found['batch']}; {seeds} seeds, medians"
    )
    for optimizer, row in found["table"].items():
        steps = f"{row['steps']:6.0f} steps {row['seconds']:7.1f} s" if row["steps"] else "    not reached      "
        step = f"{row['ms_a_step']:7.0f} ms a step" if row["ms_a_step"] else ""
        print(f"  {optimizer:8} {steps} {step}  {row['reached']}/{seeds} seeds  {found['settings'][optimizer]}")
    print(f"  {found['verdict']}")


if __name__ == "__main__":
    sys.exit(main())
