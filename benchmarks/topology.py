"""topology_optimisation: networks against SIMP and against the nearest known design, on problems that training never saw.

    python -m benchmarks topology [--data DIR] [--out DIR] [--architectures ...] [--optimizers ...] [--quick]

Data sets are made once in DIR (train16, train32, test16, test32) by the application's solver, whose cost is printed apart;
a killed run goes on where it stopped, in data, in training and in the table. Each cell trains from coarse to fine with the
same weights: 16^3, then 32^3. Speed is processor time of one core on both sides, and the
network's, exported to ONNX, includes the analysis of the solid box that it is fed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.topology_optimisation import APPLICATION, dataset, floor, metrics, pipeline
from applications.topology_optimisation.generator import spec_of
from applications.topology_optimisation.simp import Settings, Step, optimise
from edge_export.onnx_file import write_onnx
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import FieldfleetError
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import predict, set_arrays
from fl_core.report.page import Page
from fl_core.runtime.session import Session
from fl_core.storage import atomic
from hpc_trainer.processes import join
from hpc_trainer.trainer import Trainer, TrainingData

OUT = Path("runs/benchmarks/topology")
NAMES = (
    *("compliance_error", "compliance_error_median", "solid_error", "solid_error_median"),
    *("failed", "volume_error", "binarity", "floating"),
)
LEARNING_RATES = {"adamw": 0.003, "lamb": 0.01, "soap": 0.003, "kfac": 0.01}
SETS = {  # name: (side, first company, companies, problems of each, seed)
    "train16": (16, 0, 16, 16, 0),
    "train32": (32, 0, 16, 6, 0),
    "test16": (16, 16, 8, 2, 1),
    "test32": (32, 16, 8, 2, 1),
}
QUICK_SETS = {
    "train8": (8, 0, 4, 2, 0),
    "train16": (16, 0, 4, 1, 0),
    "test8": (8, 4, 4, 1, 1),
    "test16": (16, 4, 4, 1, 1),
}


@dataclass(frozen=True)
class Plan:
    """sides and epochs: coarse, fine."""

    sides: tuple[int, int]
    sets: dict[str, tuple[int, int, int, int, int]]
    epochs: tuple[int, int]
    iterations: int
    timed: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks topology", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: made in --out)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--architectures", nargs="*", default=["unet", "fourier"])
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "lamb", "soap", "kfac"])
    parser.add_argument("--epochs", type=int, nargs=2, default=(60, 20), metavar=("COARSE", "FINE"))
    parser.add_argument("--timed", type=int, default=4, help="test problems on which SIMP is run again for its time")
    parser.add_argument("--tested", type=int, default=0, help="unseen problems of each grid (default: all in DIR)")
    parser.add_argument(
        "--large", type=int, nargs="*", default=[64, 128], help="sides of one problem each, without SIMP"
    )
    parser.add_argument("--as-it-is", action="store_true", help="use what --data holds, make nothing")
    parser.add_argument("--quick", action="store_true", help="8^3 and 16^3, few problems, one epoch")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = Plan((16, 32), SETS, tuple(args.epochs), 40, args.timed)
    out = args.out
    if args.quick:
        plan, out = Plan((8, 16), QUICK_SETS, (2, 1), 6, 1), args.out / "quick"
        args.optimizers, args.large = ["adamw", "lamb"], []
    data = args.data or out / "data"
    if not args.as_it_is:
        make(data, plan)
    found = {name: read(data / name, side[0]) for name, side in plan.sets.items()}
    for name in found:
        if name.startswith("test"):
            found[name] = found[name].take(slice(0, args.tested or None))
    for name, examples in found.items():
        cost = float(examples.columns["solver_seconds"].sum())
        print(f"{name:8} {len(examples):4} designs of {plan.sets[name][0]}^3, {cost:.0f} s of solving")
    cells = []
    for architecture in args.architectures:
        for optimizer in args.optimizers:
            cells += run_cell(architecture, optimizer, found, plan, out)
    speeds = speed(cells, found, plan, out)
    floors = {side: judge_floor(found, plan, side, out) for side in plan.sides}
    print_table(cells, floors)
    beyond(cells, data, args.large, plan, out)
    report(cells, floors, speeds, found, plan, out)
    return 0


def make(folder: Path, plan: Plan) -> None:
    for name, (side, first, clients, problems, seed) in plan.sets.items():
        options = ["--size", side, "--first", first, "--clients", clients, "--problems", problems, "--seed", seed]
        dataset.main([str(folder / name), *map(str, options), "--iterations", str(plan.iterations)])


def configured(side: int, *overrides: str) -> Any:
    fixed = [f"data.size={side}", "data.judged=0", "pretrain.checkpoint_every=5", "pretrain.average_last=0.0"]
    return APPLICATION.configure([*fixed, *overrides])


def read(folder: Path, side: int) -> Examples:
    return APPLICATION.read(folder).examples(configured(side))


def judged(density: np.ndarray[Any, Any], examples: Examples) -> dict[str, float]:
    config = configured(int(density.shape[1]), f"data.judged={len(examples)}")
    found = metrics.metrics(config, {"density": density}, examples)
    solid = [metrics.solid_compliance_error(d.astype(np.float64), examples, i) for i, d in enumerate(density)]
    return found | {"solid_error": float(np.mean(solid)), "solid_error_median": float(np.median(solid))}


def kept(path: Path, make: Any) -> Any:
    """The JSON value in ``path``, made where it is not there yet."""
    if not path.is_file():
        atomic.write_json(path, make())
    return json.loads(path.read_text())


def judge_floor(found: dict[str, Examples], plan: Plan, side: int, out: Path) -> dict[str, float]:
    known, test = found[f"train{side}"], found[f"test{side}"]
    result: dict[str, float] = kept(
        out / f"floor-{side}-{len(known)}-{len(test)}.json", lambda: judged(floor.nearest_designs(known, test), test)
    )
    return result


def run_cell(
    architecture: str, optimizer: str, found: dict[str, Examples], plan: Plan, out: Path
) -> list[dict[str, Any]]:
    """Train on the coarse grid, judge, go on on the fine grid, judge; one result file a grid."""
    results = []
    start: Path | None = None
    for number, side in enumerate(plan.sides):
        folder = out / f"{architecture}-{optimizer}-{side}"
        result = folder.with_suffix(".json")
        options = [f"model.architecture={architecture}", f"optimizer.name={optimizer}"]
        rate = LEARNING_RATES.get(optimizer, 0.003) * (0.5 if number else 1.0)
        options += [f"optimizer.lr={rate}", f"pretrain.epochs={plan.epochs[number]}"]
        config = configured(side, *options)
        if not result.is_file():
            cell = {"architecture": architecture, "optimizer": optimizer, "side": side}
            try:
                cell |= train(config, found, side, start, folder)
            except FieldfleetError as error:
                cell["error"] = error.message
            atomic.write_json(result, cell)
        results.append(json.loads(result.read_text()))
        if "error" in results[-1]:
            break
        start = folder / "final"
    return results


def train(config: Any, found: dict[str, Examples], side: int, start: Path | None, folder: Path) -> dict[str, Any]:
    train, test = found[f"train{side}"], found[f"test{side}"]
    began = time.process_time()
    losses: list[float] = []

    def on_epoch(record: Any) -> None:
        losses.append(record.loss)
        print(f"  {folder.name} epoch {record.epoch} loss {record.loss:.4f}", file=sys.stderr, flush=True)

    empty = train.take(np.zeros(0, np.int64))
    data = TrainingData(train=train, validation=empty, clients=train.clients())
    trainer = Trainer(APPLICATION, config, data, processes=join(), out=folder, seed=0, on_epoch=on_epoch)
    if start is not None and trainer.done == 0:
        set_arrays(trainer.model, checkpoints.load(start).arrays, origin=str(start))
    trainer.run()
    seconds = time.process_time() - began
    outputs = predict(trainer.model, APPLICATION, config, test, batch_size=1)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": len(trainer.losses),
        "epochs": len(losses),
        "seconds": seconds,
        "loss": losses[-1] if losses else float("nan"),
        "examples": len(train),
        "metrics": judged(outputs["density"], test),
    }


def print_table(cells: list[dict[str, Any]], floors: dict[int, dict[str, float]]) -> None:
    print(f"{'grid':5} {'network':8} {'optimiser':9} {'steps':>6} {'s':>6}  " + "  ".join(NAMES))
    for cell in sorted(cells, key=lambda c: c["side"]):
        row = f"{cell['side']:<5} {cell['architecture']:8} {cell['optimizer']:9}"
        if "error" in cell:
            print(f"{row} {cell['error']}")
            continue
        values = "  ".join(f"{cell['metrics'][n]:{len(n)}.4f}" for n in NAMES)
        print(f"{row} {cell['steps']:6} {cell['seconds']:6.0f}  {values}")
    for side, found in floors.items():
        values = "  ".join(f"{found[n]:{len(n)}.4f}" for n in NAMES)
        print(f"{side:<5} {'nearest known design':33}  {values}")


def best(cells: list[dict[str, Any]], side: int) -> dict[str, Any] | None:
    usable = [c for c in cells if c["side"] == side and "metrics" in c]
    return min(usable, key=lambda c: c["metrics"]["compliance_error_median"], default=None)


def loaded(cell: dict[str, Any], out: Path) -> tuple[torch.nn.Module, Any]:
    folder = out / f"{cell['architecture']}-{cell['optimizer']}-{cell['side']}" / "final"
    manifest = checkpoints.load(folder)
    config = APPLICATION.configure_from(manifest.manifest.config, origin=str(folder))
    model = APPLICATION.build_model(config)
    set_arrays(model, manifest.arrays, origin=str(folder))
    return model.eval(), config


def speed(cells: list[dict[str, Any]], found: dict[str, Examples], plan: Plan, out: Path) -> dict[str, float]:
    """Processor seconds a problem: SIMP from the uniform design, SIMP until it is as good as the network, the network."""
    side = plan.sides[1]
    cell = best(cells, side)
    if cell is None:
        return {}
    path = out / f"speed-{cell['architecture']}-{cell['optimizer']}-{side}.json"
    result: dict[str, float] = kept(path, lambda: measure_speed(cell, found[f"test{side}"], plan, out))
    print(
        f"{side}^3, {cell['architecture']} by {cell['optimizer']}: SIMP {result['simp']:.2f} s ({result['iterations']:.0f} "
        f"iterations), until as good as the network {result['simp_equal']:.2f} s; network {result['network']:.3f} s of which "
        f"{result['response']:.3f} s analysis of the solid box: {result['simp'] / result['network']:.0f} times faster, "
        f"{result['simp_equal'] / result['network']:.1f} times at equal compliance"
    )
    return result


def beyond(cells: list[dict[str, Any]], data: Path, sides: Sequence[int], plan: Plan, out: Path) -> None:
    """The best network on finer grids: judged on DIR/test64 where it was made, else time, memory and form of one design."""
    cell = best(cells, plan.sides[1])
    if cell is None:
        return
    model, _ = loaded(cell, out)
    for side in sides:
        if (data / f"test{side}").is_dir():
            test = read(data / f"test{side}", side)
            fine = configured(side, f"model.architecture={cell['architecture']}")
            found = judged(predict(model, APPLICATION, fine, test, batch_size=1)["density"], test)
            print(f"{side}^3, {len(test)} problems: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
            continue
        fine = configured(side, f"model.architecture={cell['architecture']}")
        problem = spec_of(1, 17, 0).problem(side)
        began = time.process_time()
        prepared = pipeline.prepared([problem], fine)
        response = time.process_time() - began
        before = peak_memory()
        began = time.process_time()
        with torch.inference_mode():
            density = model(*(torch.from_numpy(prepared[spec.name]) for spec in APPLICATION.inputs(fine)))[0].numpy()
        forward = time.process_time() - began
        print(
            f"{side}^3, one problem: network {forward:.1f} s, analysis of the solid box {response:.1f} s of processor, peak "
            f"memory {peak_memory():.0f} MB (before the network {before:.0f}), binarity {pipeline.binarity(density[None])[0]:.3f}, "
            f"floating {metrics.floating(density, prepared['fixed'][0]):.4f}, volume {density.mean():.4f} of {problem.volume_fraction}",
            flush=True,
        )


def peak_memory() -> float:
    """MB that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_speed(cell: dict[str, Any], test: Examples, plan: Plan, out: Path) -> dict[str, float]:
    model, config = loaded(cell, out)
    file = out / f"{cell['architecture']}-{cell['optimizer']}-{cell['side']}.onnx"
    write_onnx(model, APPLICATION, config, test.take([0, 1]), file, opset=config.export.opset)
    session = Session(file)  # one thread
    rows: list[list[float]] = []
    for index in range(min(plan.timed, len(test))):
        problem = pipeline.problem_of(dict(test.inputs), index)
        pipeline.prepared([problem], config)  # tables that every problem of this size shares
        began = time.process_time()
        pipeline.prepared([problem], config)
        response = time.process_time() - began
        one = test.take([index])
        session.run(one.inputs)
        began = time.process_time()
        density = session.run(one.inputs)["density"]
        forward = time.process_time() - began
        target = metrics.compliance(problem, density[0].astype(np.float64))
        full, equal, count = timed_simp(problem, config, target, plan.iterations)
        rows.append([full, equal, response + forward, response, count])
        print(f"  SIMP {full:.1f} s, network {response + forward:.3f} s", file=sys.stderr, flush=True)
    medians = np.median(np.array(rows), axis=0)
    return dict(zip(("simp", "simp_equal", "network", "response", "iterations"), map(float, medians), strict=True))


def timed_simp(problem: Any, config: Any, target: float, iterations: int) -> tuple[float, float, int]:
    """(processor seconds of the whole run, of the part until ``target`` is reached at full penalty, iterations)."""
    radius = max(1.5, 0.05 * config.data.size)
    began = time.process_time()
    reached: list[float] = []

    def on_step(number: int, step: Step, density: Any) -> bool:
        if not reached and step.penalty >= 3.0 and step.compliance <= target:
            reached.append(time.process_time() - began)
        return False

    settings = Settings(radius=radius, limit=iterations, change=0.02, tolerance=2e-3)
    design = optimise(problem, settings, on_step=on_step)
    full = time.process_time() - began
    return full, (reached or [full])[0], len(design.steps)


def report(
    cells: list[dict[str, Any]], floors: Any, speeds: Any, found: dict[str, Examples], plan: Plan, out: Path
) -> None:
    """report.html: the table, the speeds, slices and structures of three unseen problems of each grid."""
    from applications.topology_optimisation import pictures

    page = Page("Topology optimisation", "Networks against SIMP on problems that training never saw")
    rows = [
        [
            f"{c['side']}^3",
            c["architecture"],
            c["optimizer"],
            c["steps"],
            c["seconds"],
            *(c["metrics"][n] for n in NAMES),
        ]
        for c in cells
        if "metrics" in c
    ]
    rows += [[f"{s}^3", "nearest known design", "", None, None, *(f[n] for n in NAMES)] for s, f in floors.items()]
    page.section("Table").table(["grid", "network", "optimiser", "steps", "seconds", *NAMES], rows)
    if speeds:
        page.section("Speed, processor seconds a problem").table(list(speeds), [list(speeds.values())])
    for side in plan.sides:
        cell = best(cells, side)
        if cell is None:
            continue
        model, config = loaded(cell, out)
        test = found[f"test{side}"].take(slice(0, 4))
        density = predict(model, APPLICATION, config, test, batch_size=1)["density"]
        truth = pipeline.target_density(test.targets)
        page.section(f"{side}^3: {cell['architecture']} by {cell['optimizer']}")
        for i in range(len(test)):
            name = str(test.columns["example_id"][i])
            error = metrics.compliance_error(density[i].astype(np.float64), test, i)
            load = np.sqrt((test.inputs["force"][i] ** 2).sum(axis=0))
            columns = {
                "input: strain energy (log)": (test.inputs["response"][i][0], "magma", -2.0, 2.0),
                "input: load": (load, "Reds", 0.0, 1.0),
                "SIMP": (truth[i], "Greys", 0.0, 1.0),
                "network": (density[i], "Greys", 0.0, 1.0),
                "network - SIMP": (density[i] - truth[i], "RdBu", -1.0, 1.0),
            }
            caption = f"{name}: compliance error {error:+.3f}"
            page.picture(pictures.structures({"SIMP": truth[i], "network": density[i]}, caption), caption)
            page.picture(pictures.slices(columns, caption), caption)
    page.write(out / "report.html")
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
