"""topology_optimisation: networks against SIMP and against the nearest known design, on problems that training never saw.

    python -m benchmarks topology [--data DIR] [--out DIR] [--architectures ...] [--optimizers ...] [--seeds N]
        [--refine EPOCHS] [--quick]

Data sets are made once in DIR (train, val and test on 16^3 and 32^3) by the application's solver, whose cost is printed apart;
a killed run goes on where it stopped, in data, in training and in the table. Each cell trains from coarse to fine with the
same weights: designs of 16^3, of 32^3, then also the compliance itself by its adjoint at 32^3. What is chosen (the sharpness of
the designs, the best cell) is chosen on the val sets. Speed is processor time of one core on both sides, and the
network's, exported to ONNX, includes the analysis of the solid box that it is fed. A seed has its own network and test problems;
speed, finer grids and the report are those of the first. Exit code 1: a goal at 32^3 is missed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.topology_optimisation import APPLICATION, metrics, pipeline
from applications.topology_optimisation.generator import spec_of
from applications.topology_optimisation.simp import Settings, Step, optimise
from benchmarks._topology_cells import (
    LEARNING_RATES,
    Cell,
    Plan,
    Stage,
    best,
    configured,
    data_sets,
    designs,
    fitted,
    folder_of,
    judge_floor,
    judged,
    kept,
    loaded,
    make,
    read,
    run_cell,
    set_name,
)
from benchmarks._topology_report import judge, print_table, report
from edge_export.onnx_file import write_onnx
from fl_core.contracts.errors import DataError
from fl_core.learning.examples import Examples
from fl_core.runtime.session import Session

OUT = Path("runs/benchmarks/topology")
REPEATED = 7  # calls of a network, which take hundredths of a second


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks topology", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: made in --out)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--architectures", nargs="*", default=["unet", "fourier"])
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "lamb", "soap", "kfac"])
    parser.add_argument(
        "--epochs",
        type=int,
        nargs=3,
        default=(30, 20, 3),
        metavar=("COARSE", "FINE", "COMPLIANCE"),
        help="0 = leave out",
    )
    parser.add_argument("--threads", type=int, default=1, help="of training; speed is always measured on one")
    parser.add_argument("--timed", type=int, default=4, help="test problems on which SIMP is run again for its time")
    parser.add_argument(
        "--large", type=int, nargs="*", default=[64, 128], help="finer grids: test64 where it is made, else one problem"
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="of the best network on --large's trainN, made beforehand",
    )
    parser.add_argument("--judged", type=int, default=0, metavar="N", help="val and test problems (default: all)")
    parser.add_argument("--as-it-is", action="store_true", help="use what --data holds, make nothing")
    parser.add_argument("--seeds", type=int, default=1, help="networks trained, each judged on other test problems")
    parser.add_argument("--quick", action="store_true", help="8^3 and 16^3, few problems, one epoch")
    args = parser.parse_args(arguments)
    (coarse, fine), epochs, out = (16, 32), tuple(args.epochs), args.out
    iterations, timed = 40, args.timed
    if args.quick:
        (coarse, fine), epochs, out = (8, 16), (2, 1, 1), args.out / "quick"
        iterations, timed = 6, 1
        args.optimizers, args.large = ["adamw", "lamb"], []
    stages = (
        Stage(name=f"{coarse}", side=coarse, epochs=epochs[0]),
        Stage(name=f"{fine}", side=fine, epochs=epochs[1], rate=0.5),
        Stage(name=f"{fine}-compliance", side=fine, epochs=epochs[2], rate=0.2, compliance_weight=1.0),
    )
    sets = {n: s for seed in range(args.seeds) for n, s in data_sets(coarse, fine, seed=seed, quick=args.quick).items()}
    plan = Plan(
        sets=sets,
        stages=tuple(s for s in stages if s.epochs),
        iterations=iterations,
        timed=timed,
    )
    data = args.data or out / "data"
    if not args.as_it_is:
        make(data, plan)
    found = {name: read(data / name, s.side) for name, s in plan.sets.items() if s.side in plan.sides}
    if not args.as_it_is:
        for name, s in plan.sets.items():
            if name in found and len(found[name]) != s.clients * s.problems:
                raise DataError(
                    f"{data / name}: {len(found[name])} designs, {s.clients * s.problems} belong to this set",
                    remedy="move the folder away: it holds problems of another version",
                )
    if args.judged:
        few = {name: one for name, one in found.items() if not name.startswith("train")}
        found |= {name: one.take(spread(one, args.judged)) for name, one in few.items()}
    for name, examples in found.items():
        cost = examples.columns["solver_seconds"]
        known = f"{cost.sum():.0f} s of solving for {np.count_nonzero(cost)} of them"
        print(f"{name:8} {len(examples):4} designs of {plan.sets[name].side}^3, {known}")
    seeds, floors = [], []
    for seed in range(args.seeds):
        mine = {f"{k}{side}": found[set_name(k, side, seed)] for k in ("train", "val", "test") for side in plan.sides}
        place = out / f"seed-{seed}" if seed else out
        torch.set_num_threads(args.threads)
        kinds = [(a, o) for a in args.architectures for o in args.optimizers]
        seeds.append([cell for a, o in kinds for cell in run_cell(a, o, mine, data, plan, place, seed)])
        torch.set_num_threads(1)
        floors.append({side: judge_floor(mine, side, place) for side in plan.sides})
    print_table(seeds, floors)
    first = {f"test{side}": found[set_name("test", side, 0)] for side in plan.sides}
    speeds = speed(seeds[0], first, plan, out) if timed else {}
    beyond(seeds[0], data, args.large, plan, out, args.refine)
    report(seeds[0], floors[0], speeds, first, plan, out)
    return 0 if args.quick else judge(seeds, floors, speeds, fine)


def spread(examples: Examples, count: int) -> Any:
    """The first ``count`` problems, one of each company before the second of any: neighbouring companies are of all families."""
    names = examples.columns["client"].tolist()
    turn = [names[:i].count(name) for i, name in enumerate(names)]
    return np.sort(np.argsort(turn, kind="stable")[:count])


def speed(cells: list[Cell], found: dict[str, Examples], plan: Plan, out: Path) -> dict[str, float]:
    """Processor seconds a problem: SIMP from the uniform design, SIMP until it is as good as the network, the network."""
    side = plan.sides[-1]
    cell = best(cells, side)
    if cell is None:
        return {}
    path = out / f"speed-{folder_of(cell, out).name}-{plan.timed}.json"
    result: dict[str, float] = kept(path, lambda: measure_speed(cell, found[f"test{side}"], plan, out))
    print(
        f"{side}^3, {cell['architecture']} by {cell['optimizer']}: SIMP {result['simp']:.2f} s ({result['iterations']:.0f} "
        f"iterations), until as good as the network {result['simp_equal']:.2f} s; network {result['network']:.3f} s of which "
        f"{result['response']:.3f} s analysis of the solid box: {result['simp'] / result['network']:.0f} times faster, "
        f"{result['simp_equal'] / result['network']:.1f} times at equal compliance"
    )
    return result


def beyond(cells: list[Cell], data: Path, sides: Sequence[int], plan: Plan, out: Path, refine: int) -> None:
    """The best network on finer grids: judged on DIR/test64 where it was made, else time, memory and form of one design.

    refine: epochs on the compliance of DIR/train64, where that was made, after which it is judged again.
    """
    cell = best(cells, plan.sides[-1])
    if cell is None:
        return
    model, _ = loaded(cell, out)
    for side in sides:
        if (data / f"test{side}").is_dir():
            on_designs(cell, model, data, side, out, refine)
        else:
            on_one_problem(cell, model, side)


def on_designs(cell: Cell, model: torch.nn.Module, data: Path, side: int, out: Path, refine: int) -> None:
    folder, test = folder_of(cell, out), read(data / f"test{side}", side)
    path = out / f"{folder.name}-on-{side}-{len(test)}.json"
    print_finer(f"{side}^3, {len(test)} problems", kept(path, partial(judged_designs, model, cell, test)))
    if refine and (data / f"train{side}").is_dir():
        train = read(data / f"train{side}", side)
        name = Path(f"{folder}-{side}-{len(train)}x{refine}")
        path = out / f"{name.name}-on-{len(test)}.json"
        found = kept(path, partial(refined, cell, folder / "final", name, data, train, refine, test))
        print_finer(f"{side}^3, after {refine} more epochs on the compliance of {len(train)} problems there", found)


def on_one_problem(cell: Cell, model: torch.nn.Module, side: int) -> None:
    config = configured(side, f"model.architecture={cell['architecture']}")
    problem = spec_of(1, 17, 0).problem(side)
    began = time.process_time()
    prepared = pipeline.prepared([problem], config)
    response = time.process_time() - began
    before = peak_memory()
    began = time.process_time()
    with torch.inference_mode():
        density = model(*(torch.from_numpy(prepared[spec.name]) for spec in APPLICATION.inputs(config)))[0].numpy()
    forward = time.process_time() - began
    print(
        f"{side}^3, one problem: network {forward:.1f} s, analysis of the solid box {response:.1f} s of processor, peak "
        f"memory {peak_memory():.0f} MB (before the network {before:.0f}), binarity {pipeline.binarity(density[None])[0]:.3f}, "
        f"floating {metrics.floating(density, prepared['fixed'][0]):.4f}, volume {density.mean():.4f} of {problem.volume_fraction}",
        flush=True,
    )


def judged_designs(model: torch.nn.Module, cell: Cell, test: Examples) -> dict[str, float]:
    return judged(designs(model, cell["sharpness"], test), test)


def print_finer(what: str, found: dict[str, float]) -> None:
    print(f"{what}: " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)


def refined(
    cell: Cell, start: Path, folder: Path, data: Path, train: Examples, epochs: int, test: Examples
) -> dict[str, float]:
    """The network after ``epochs`` on the compliance of ``train``'s problems on a finer grid; their designs may be rough ones."""
    side = train.inputs["force"].shape[-1] - 1
    options = [f"optimizer.name={cell['optimizer']}", f"model.architecture={cell['architecture']}"]
    options += [f"optimizer.lr={LEARNING_RATES.get(cell['optimizer'], 0.003) * 0.1}", f"pretrain.epochs={epochs}"]
    options += ["model.compliance_weight=1.0", "pretrain.batch_size=4", "pretrain.micro_batch=1"]
    trainer, _, seconds = fitted(configured(side, *options), {f"train{side}": train}, data, start, folder, seed=0)
    return judged(designs(trainer.model, cell["sharpness"], test), test) | {"seconds of training": seconds}


def peak_memory() -> float:
    """MB that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_speed(cell: Cell, test: Examples, plan: Plan, out: Path) -> dict[str, float]:
    model, config = loaded(cell, out)
    file = folder_of(cell, out).with_suffix(".onnx")
    write_onnx(model, APPLICATION, config, test.take([0, 1]), file, opset=config.export.opset)
    session = Session(file)  # one thread
    rows: list[list[float]] = []
    for index in range(min(plan.timed, len(test))):
        problem = pipeline.problem_of(dict(test.inputs), index)
        one = test.take([index])
        response, _ = processor_seconds(partial(pipeline.prepared, [problem], config))
        forward, outputs = processor_seconds(partial(session.run, one.inputs))
        density = outputs["density"]
        target = metrics.compliance(problem, density[0].astype(np.float64))
        full, equal, count = timed_simp(problem, config, target, plan.iterations)
        rows.append([full, equal, response + forward, response, count])
        print(f"  SIMP {full:.1f} s, network {response + forward:.3f} s", file=sys.stderr, flush=True)
    medians = np.median(np.array(rows), axis=0)
    return dict(zip(("simp", "simp_equal", "network", "response", "iterations"), map(float, medians), strict=True))


def processor_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """(median of REPEATED calls after one that warms up, the last result)."""
    work()
    found = []
    for _ in range(REPEATED):
        began = time.process_time()
        result = work()
        found.append(time.process_time() - began)
    return float(np.median(found)), result


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


if __name__ == "__main__":
    sys.exit(main())
