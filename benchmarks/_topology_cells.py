"""Cells of ``benchmarks topology``: data sets, training from coarse to fine, and what the networks are worth on unseen problems.

Every cell keeps one result file a stage; a repeated call goes on where the last one stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.topology_optimisation import APPLICATION, dataset, floor, metrics, pipeline
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import FieldfleetError
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import predict, set_arrays
from fl_core.storage import atomic
from hpc_trainer.processes import join
from hpc_trainer.trainer import Trainer, TrainingData, read_training_history

NAMES = (
    *("compliance_error", "compliance_error_median", "solid_error", "solid_error_median"),
    *("failed", "volume_error", "binarity", "floating"),
)
LEARNING_RATES = {"adamw": 0.003, "lamb": 0.01, "soap": 0.003, "kfac": 0.01}
SHARPNESS = (4.0, 8.0)  # tried on the validation problems
REFERENCES: dict[tuple[str, int], float] = {}
Cell = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """``problems`` of each of ``clients`` companies from number ``first`` on; no two sets but those of one kind share a company."""

    side: int
    first: int
    clients: int
    problems: int
    seed: int
    coarse: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a training; the next one goes on with its weights."""

    name: str
    side: int
    epochs: int
    compliance_weight: float = 0.0
    rate: float = 1.0  # factor on the optimiser's learning rate


@dataclass(frozen=True, kw_only=True)
class Plan:
    sets: dict[str, DataSet]
    stages: tuple[Stage, ...]
    iterations: int
    timed: int

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(s.side for s in self.stages))


def set_name(kind: str, side: int, seed: int) -> str:
    """The folder of a set of problems; each seed has test problems of its own."""
    return f"seed-{seed}/{kind}{side}" if seed and kind == "test" else f"{kind}{side}"


def data_sets(coarse: int, fine: int, *, seed: int = 0, quick: bool) -> dict[str, DataSet]:
    """Training companies 0 to 15, validation 16 to 31, test 40 to 47 (seed 1: the eight after them, and so on).

    Each fine problem is one of the coarse set.
    """
    if quick:
        train, few, val, test = (4, 2), (4, 1), (4, 4, 1), (8, 4, 1)
    else:
        train, few, val, test = (16, 16), (16, 6), (16, 16, 1), (40, 8, 2)
    test = (test[0] + seed * test[1], *test[1:])
    made = {
        f"train{coarse}": DataSet(side=coarse, first=0, clients=train[0], problems=train[1], seed=0),
        f"train{fine}": DataSet(side=fine, first=0, clients=few[0], problems=few[1], seed=0, coarse=f"train{coarse}"),
    }
    for kind, (first, clients, problems) in (("val", val), ("test", test)):
        for side, below in ((coarse, ""), (fine, set_name(kind, coarse, seed))):
            made[set_name(kind, side, seed)] = DataSet(
                side=side, first=first, clients=clients, problems=problems, seed=1, coarse=below
            )
    return made


def make(folder: Path, plan: Plan) -> None:
    for name, s in plan.sets.items():
        options = [
            "--size",
            s.side,
            "--first",
            s.first,
            "--clients",
            s.clients,
            "--problems",
            s.problems,
            "--seed",
            s.seed,
        ]
        options += ["--coarse", folder / s.coarse] if s.coarse else []
        dataset.main([str(folder / name), *map(str, options), "--iterations", str(plan.iterations)])


def configured(side: int, *overrides: str) -> Any:
    fixed = [f"data.size={side}", "data.judged=0", "pretrain.checkpoint_every=5", "pretrain.average_last=0.0"]
    return APPLICATION.configure([*fixed, *overrides])


def read(folder: Path, side: int, *overrides: str) -> Examples:
    return APPLICATION.read(folder).examples(configured(side, *overrides))


def judged(density: np.ndarray[Any, Any], examples: Examples) -> dict[str, float]:
    return plain_scores(density, examples) | solid_scores(density, examples)


def plain_scores(density: np.ndarray[Any, Any], examples: Examples) -> dict[str, float]:
    config = configured(int(density.shape[1]), f"data.judged={len(examples)}")
    return metrics.metrics(config, {"density": density}, examples)


def solid_scores(density: np.ndarray[Any, Any], examples: Examples) -> dict[str, float]:
    solid = [solid_error(d, examples, i) for i, d in enumerate(density)]
    return {"solid_error": float(np.mean(solid)), "solid_error_median": float(np.median(solid))}


def solid_error(density: np.ndarray[Any, Any], examples: Examples, index: int) -> float:
    """Of the solid parts of both designs; SIMP's is analysed once for all cells."""
    problem = pipeline.problem_of(dict(examples.inputs), index)
    key = (str(examples.columns["example_id"][index]), density.shape[-1])
    if key not in REFERENCES:
        REFERENCES[key] = metrics.solid_compliance(problem, pipeline.target_density(examples.targets)[index])
    return metrics.solid_compliance(problem, density) / REFERENCES[key] - 1


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in ``path``, made where it is not there yet."""
    if not path.is_file():
        atomic.write_json(path, make())
    return json.loads(path.read_text())


def judge_floor(found: dict[str, Examples], side: int, out: Path) -> dict[str, float]:
    known, test = found[f"train{side}"], found[f"test{side}"]
    path = out / f"floor-{side}-{len(known)}-{len(test)}.json"
    result: dict[str, float] = kept(path, lambda: judged(floor.nearest_designs(known, test), test))
    return result


def run_cell(
    architecture: str, optimizer: str, found: dict[str, Examples], data: Path, plan: Plan, out: Path, seed: int
) -> list[Cell]:
    """All stages of one network and optimiser; each is judged on the test problems of its grid."""
    results: list[Cell] = []
    start: Path | None = None
    for stage in plan.stages:
        folder = out / f"{architecture}-{optimizer}-{stage.name}"
        path = folder.with_suffix(".json")
        options = [f"model.architecture={architecture}", f"optimizer.name={optimizer}"]
        options += [f"optimizer.lr={LEARNING_RATES.get(optimizer, 0.003) * stage.rate}"]
        options += [f"pretrain.epochs={stage.epochs}", f"model.compliance_weight={stage.compliance_weight}"]
        if not path.is_file():
            cell: Cell = {"architecture": architecture, "optimizer": optimizer, "stage": stage.name, "side": stage.side}
            try:
                cell |= train(configured(stage.side, *options), found, data, start, folder, seed)
            except FieldfleetError as error:
                cell["error"] = error.message
            atomic.write_json(path, cell)
        results.append(json.loads(path.read_text()))
        if "error" in results[-1]:
            break
        start = folder / "final"
    return results


def fitted(
    config: Any, found: dict[str, Examples], data: Path, start: Path | None, folder: Path, seed: int
) -> tuple[Trainer, list[dict[str, Any]], float]:
    """Trained in ``folder`` from ``start``'s weights: the trainer, its epochs' records, and processor seconds.

    A stopped training goes on; its seconds are then by the clock, since the processor's of an earlier start are not known.
    """
    side, weight = config.data.size, config.model.compliance_weight
    train = found[f"train{side}"]
    if weight > 0:  # these targets carry the problem
        train = read(data / f"train{side}", side, f"model.compliance_weight={weight}")
    began = time.process_time()

    def on_epoch(record: Any) -> None:
        seconds = time.process_time() - began
        print(
            f"  {folder.name} epoch {record.epoch} loss {record.loss:.4f} {seconds:.0f} s", file=sys.stderr, flush=True
        )

    parts = TrainingData(train=train, validation=train.take(np.zeros(0, np.int64)), clients=train.clients())
    trainer = Trainer(APPLICATION, config, parts, processes=join(), out=folder, seed=seed, on_epoch=on_epoch)
    if start is not None and trainer.progress.epoch == trainer.progress.step == 0:
        set_arrays(trainer.model, checkpoints.load(start).arrays, origin=str(start))
    resumed = trainer.progress.epoch > 0
    trainer.run()
    seconds, history = time.process_time() - began, read_training_history(folder)
    return trainer, history, sum(record["seconds"] for record in history) if resumed else seconds


def train(config: Any, found: dict[str, Examples], data: Path, start: Path | None, folder: Path, seed: int) -> Cell:
    trainer, history, seconds = fitted(config, found, data, start, folder, seed)
    side = config.data.size
    model, test = trainer.model, found[f"test{side}"]

    def judge(part: str, make: Callable[[], Any]) -> Any:
        return kept(folder.with_name(f"{folder.name}.{part}.json"), make)

    validated = {s: judge(f"val-{s}", partial(validation_error, model, s, found[f"val{side}"])) for s in SHARPNESS}
    sharpness = min(validated, key=lambda s: validated[s])
    density = designs(model, sharpness, test)
    scores = judge("test", partial(plain_scores, density, test)) | judge("solid", partial(solid_scores, density, test))
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.steps * config.pretrain.epochs,
        "seconds": seconds,
        "wall": sum(record["seconds"] for record in history),
        "loss": history[-1]["loss"],
        "examples": len(found[f"train{side}"]),
        "validated": [[s, error] for s, error in validated.items()],
        "sharpness": sharpness,
        "metrics": scores,
    }


def validation_error(model: torch.nn.Module, sharpness: float, examples: Examples) -> float:
    """Mean compliance error on problems that neither training nor the test holds."""
    density = designs(model, sharpness, examples)
    return float(np.mean([metrics.compliance_error(d.astype(np.float64), examples, i) for i, d in enumerate(density)]))


def designs(model: torch.nn.Module, sharpness: float, examples: Examples) -> np.ndarray[Any, Any]:
    """(N, elements...) densities."""
    model.sharpness = sharpness  # type: ignore[assignment]
    side = examples.inputs["force"].shape[-1] - 1
    return predict(model, APPLICATION, configured(side), examples, batch_size=1)["density"]


def best(cells: list[Cell], side: int) -> Cell | None:
    """By the validation problems: the cell of that grid whose designs are stiffest there."""
    usable = [c for c in cells if c["side"] == side and "metrics" in c]
    return min(usable, key=lambda c: min(error for _, error in c["validated"]), default=None)


def folder_of(cell: Cell, out: Path) -> Path:
    return out / f"{cell['architecture']}-{cell['optimizer']}-{cell['stage']}"


def loaded(cell: Cell, out: Path) -> tuple[torch.nn.Module, Any]:
    folder = folder_of(cell, out) / "final"
    manifest = checkpoints.load(folder)
    overrides = [f"model.sharpness={cell['sharpness']}", "model.compliance_weight=0"]
    config = APPLICATION.configure_from(manifest.manifest.config, overrides, origin=str(folder))
    model = APPLICATION.build_model(config)
    set_arrays(model, manifest.arrays, origin=str(folder))
    return model.eval(), config
