"""``fieldfleet profile``: what each stage of a training step costs as the problem grows, and the power with which it grows.

One dimension of the problem at a time is set to several sizes: the edge of the volume or image, the channels, the batch. Fresh
processes train a few steps at each, on examples of ones; beside the fitted power stand the one that the formula of the work gives, and
the one that the work counted at the very same sizes has (what is small beside the leading term is counted there too).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.progress import Progress
from fl_core.learning.application import Application, application
from hpc_trainer import phases
from hpc_trainer.performance import fits
from hpc_trainer.performance.estimate import estimate, target_of
from hpc_trainer.performance.phase_clock import GRADIENTS_WAIT
from hpc_trainer.performance.worker import start

FORMAT = 1
SKIP, LEAST = 2, 4  # first steps of a process left out; sizes that a scan needs
SMALLEST_MEMORY = 2_000_000  # bytes: less is pages of the allocator
EDGE, CHANNELS, BATCH = "edge", "channels", "batch"
KEYS = {  # under which applications hold them; those that change together are joined
    EDGE: ("data.crop+data.stride", "data.crop", "data.size", "data.image_size"),
    CHANNELS: ("model.width", "model.hidden"),
    BATCH: ("pretrain.batch_size",),
}
FACTORS = {EDGE: (0.5, 1.0, 1.5, 2.0), CHANNELS: (0.5, 1.0, 2.0, 3.0), BATCH: (0.25, 0.5, 1.0, 2.0)}
STAGES = (*phases.NAMES[:4], phases.BACKWARD, phases.OPTIMIZER, phases.CHECKPOINT)
COUNTED_BY = {
    phases.FORWARD: "forward operations", phases.BACKWARD: "backward operations", phases.COMMUNICATION: "parameters",
    phases.OPTIMIZER: "parameters", phases.CHECKPOINT: "parameters",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scan:
    """dimension: edge, channels or batch, where the keys are known to be one; else the keys."""

    dimension: str
    keys: tuple[str, ...]
    sizes: tuple[int, ...]

    def overrides(self, size: int) -> list[str]:
        return [f"{key}={size}" for key in self.keys]


def formula(stage: str, dimension: str, axes: int, dense: bool, memory: bool) -> int | None:
    """The power of the leading term: N samples of E^axes places, layers of W channels each.

    Convolutions do N E^axes W^2 multiply-adds; activations hold N E^axes W numbers; parameters are W^2, whatever N and E.
    """
    places, parameters = {EDGE: axes, CHANNELS: 0, BATCH: 1}, {EDGE: 0, CHANNELS: 2, BATCH: 0}
    powers = {
        phases.INPUT: places,
        phases.FORWARD: {**places, CHANNELS: 1 if memory else 2},
        phases.LOSS: places if dense else {**places, EDGE: 0},
        phases.BACKWARD: {**places, CHANNELS: 1 if memory else 2},
    }
    return powers.get(stage, parameters).get(dimension)


def scans_of(app: Application, preset: str, overrides: Sequence[str], asked: Sequence[str]) -> list[Scan]:
    """Those asked for, as KEY=SIZE,SIZE,... ; else edge, channels and batch around the configuration's own sizes."""
    if asked:
        return [_asked(text) for text in asked]
    table = to_table(app.configure(overrides, preset=preset))
    found = []
    for dimension, choices in KEYS.items():
        for joined in choices:
            keys = tuple(joined.split("+"))
            values = [table.get(key.split(".")[0], {}).get(key.split(".")[1]) for key in keys]
            if all(isinstance(v, int) for v in values):
                sizes = sorted({max(1, round(values[0] * f)) for f in FACTORS[dimension]})
                found.append(Scan(dimension=dimension, keys=keys, sizes=tuple(sizes)))
                break
    return [scan for scan in found if len(scan.sizes) >= LEAST]


def _asked(text: str) -> Scan:
    keys, _, sizes = text.partition("=")
    try:
        numbers = tuple(sorted({int(s) for s in sizes.split(",")}))
    except ValueError:
        numbers = ()
    if len(numbers) < LEAST or numbers[0] < 1:
        raise InputError(
            f"--scan {text}: write a key and at least {LEAST} different sizes",
            remedy="such as --scan data.crop+data.stride=16,32,48,64, or --scan pretrain.batch_size=1,2,4,8",
        )
    dimension = next((d for d, choices in KEYS.items() if keys in choices), keys)
    return Scan(dimension=dimension, keys=tuple(keys.split("+")), sizes=numbers)


def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Every size of every scan in fresh processes."""
    app = application(args.app)
    if args.steps < 3:
        raise InputError(f"--steps {args.steps}: at least 3 are needed for a median")
    if args.procs < 1:
        raise InputError(f"--procs {args.procs}: at least one process is needed")
    scans = scans_of(app, args.preset, args.overrides, args.scan or [])
    for scan in scans:  # all sizes are refused before any is measured
        for size in scan.sizes:
            app.configure([*args.overrides, *scan.overrides(size)], preset=args.preset)
    config = app.configure(args.overrides, preset=args.preset)
    axes = max(len(s.shape) for s in app.inputs(config)) - 2
    document: dict[str, Any] = {
        "format": FORMAT,
        "application": app.name,
        "processes": args.procs,
        "steps": args.steps,
        "axes": max(0, axes),
        "scans": [],
    }
    with Progress(f"profile {app.name}", sum(len(s.sizes) for s in scans)) as bar:
        done = 0
        for scan in scans:
            rows = []
            for size in scan.sizes:
                rows.append(_one(args, app, scan, size, out / f"{scan.dimension}-{size}"))
                done += 1
                bar.update(done, f"{'+'.join(scan.keys)}={size}")
            document["scans"].append(_scan(scan, rows, document["axes"]))
    return document


def _one(args: argparse.Namespace, app: Application, scan: Scan, size: int, folder: Path) -> dict[str, Any]:
    overrides = [*args.overrides, *scan.overrides(size)]
    target = target_of(app, args.preset, overrides)
    parallel = app.configure(overrides, preset=args.preset).pretrain.parallel
    counted = estimate(app, args.preset, overrides, world=args.procs, parallel=parallel)
    spec = {
        "work": "profile",
        "application": app.name,
        "preset": args.preset,
        "overrides": overrides,
        "target": [list(target.shape[1:]), str(target.dtype).removeprefix("torch.")],
        "seed": args.seed,
        "dtype": "float32",
        "steps": args.steps + SKIP,
        "skip": SKIP,
    }
    return {"ranks": start(spec, args.procs, folder), "counted": counted, "dense": target.dim() > 2}


def _scan(scan: Scan, rows: list[dict[str, Any]], axes: int) -> dict[str, Any]:
    """Of each stage: the slowest rank's median time and the largest memory, by size, and their powers."""
    stages: dict[str, Any] = {}
    for stage in STAGES:
        seconds = [max(_seconds(rank, stage) for rank in row["ranks"]) for row in rows]
        memory = [max(max(rank["memory"].get(stage, [0])) for rank in row["ranks"]) for row in rows]
        if stage == phases.COMMUNICATION and len(rows[0]["ranks"]) == 1:
            continue
        dense = rows[0]["dense"]
        stages[stage] = {
            "seconds": _power(scan, seconds, stage, axes, dense, memory=False, counted=_counted(stage, rows)),
            "memory_bytes": _power(scan, memory, stage, axes, dense, memory=True, counted=_held(stage, rows)),
        }
    return {"dimension": scan.dimension, "keys": list(scan.keys), "sizes": list(scan.sizes), "stages": stages}


def _seconds(rank: dict[str, Any], stage: str) -> float:
    """The end of the backward pass, in which others' gradients are awaited, is communication."""
    values = rank["stages"].get(stage, [])
    if stage == phases.COMMUNICATION:
        waits = rank["stages"].get(GRADIENTS_WAIT, [0.0] * len(values))
        values = [a + b for a, b in zip(values, waits, strict=True)]
    return float(median(values)) if values else 0.0


def _counted(stage: str, rows: list[dict[str, Any]]) -> list[float] | None:
    facts = [row["counted"] for row in rows]
    return {
        "forward operations": [float(f["flops"]["forward"]) for f in facts],
        "backward operations": [float(f["flops"]["backward"]) for f in facts],
        "parameters": [float(f["parameters"]) for f in facts],
    }.get(COUNTED_BY.get(stage, ""))


def _held(stage: str, rows: list[dict[str, Any]]) -> list[float] | None:
    if stage not in (phases.FORWARD, phases.BACKWARD):
        return _counted(stage, rows)
    kinds = ("activations",) if stage == phases.FORWARD else ("activations", "temporaries", "gradients")
    return [float(sum(row["counted"]["memory_bytes"].get(k, 0) for k in kinds)) for row in rows]


def _power(
    scan: Scan, values: list[float], stage: str, axes: int, dense: bool, *, memory: bool, counted: list[float] | None
) -> dict[str, Any]:
    found = None if memory and min(values) < SMALLEST_MEMORY else fits.exponent(scan.sizes, values)
    by_count = fits.exponent(scan.sizes, counted) if counted else None
    return {
        "values": values,
        "exponent": found.document() if found else None,
        "formula": formula(stage, scan.dimension, axes, dense, memory),
        "counted": by_count.value if by_count else None,
    }
