"""``fieldfleet verify-loss``: the real trainer at several numbers of processes, held to one process, number by number.

Each world trains in processes of its own (torchrun), with the command's Trainer, and records the loss of every step,
gradients of the first step, of each tail batch and of the last step, final weights, running statistics and validation
loss. A deviation is the largest difference, relative to the largest magnitude in one process's table of that kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fl_core.contracts import arrays as array_format
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import DataError, EnvironmentFault, InputError
from fl_core.contracts.progress import Progress
from fl_core.learning.application import Application

SAMPLES, BATCH, EPOCHS = 51, 16, 10  # the tail batch holds 3: at 4 processes one is empty
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
KINDS = ("losses", "gradients", "weights", "statistics", "validation")
RECORD = "record.safetensors"
# Plain descent: clipping and AdamW forgive a gradient of the wrong scale. Small steps: at large ones training is chaotic.
SETTINGS = (
    *("optimizer.name=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9", "optimizer.clip_norm=0"),
    *("pretrain.schedule=constant", "pretrain.average_last=0", "model.norm=batch"),
    *(f"pretrain.batch_size={BATCH}", f"pretrain.epochs={EPOCHS}", f"pretrain.checkpoint_every={EPOCHS}"),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number of processes against one. deviations: kind -> relative; worst: kind -> the entry with the largest."""

    processes: int
    deviations: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def within(self, tolerance: float) -> bool:
        return not self.error and all(d <= tolerance for d in self.deviations.values())


def settings_of(app: Application, overrides: Sequence[str]) -> list[str]:
    """Ours, then the application's own (small data, uneven weights), then the user's."""
    return [*SETTINGS, *app.verify, *overrides]


def compare(one: Arrays, other: Arrays, processes: int) -> Comparison:
    """Both tables have the same names, each beginning with its kind."""
    if set(one) != set(other):
        odd = sorted(set(one) ^ set(other))[0]
        return Comparison(processes=processes, error=f"{odd} was recorded by one of them only")
    deviations, worst = {}, {}
    for kind in KINDS:
        names = [n for n in one if n.partition("/")[0] == kind]
        if not names:
            continue
        scale = max(float(np.abs(one[n]).max(initial=0)) for n in names) or 1.0
        found = {n: _difference(one[n], other[n]) / scale for n in names}
        name = max(found, key=lambda n: (np.isnan(found[n]), found[n]))
        deviations[kind], worst[kind] = found[name], name.partition("/")[2]
    return Comparison(processes=processes, deviations=deviations, worst=worst)


def _difference(a: Any, b: Any) -> float:
    if a.shape != b.shape:
        return float("inf")
    worst = float(np.abs(a - b).max(initial=0))
    return float("inf") if np.isnan(worst) else worst


def run_world(specification: Mapping[str, Any], world: int, folder: Path) -> Arrays:
    """Train in ``world`` fresh processes; what they recorded. Raises InputError with what a process said on failing."""
    folder.mkdir()
    (folder / "specification.json").write_text(json.dumps(specification))
    launcher = ["-m", "hpc_trainer.launch", "--nnodes", "1", "--nproc-per-node", str(world)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    worker = ["-m", "hpc_trainer.verify_worker", str(folder)]
    done = subprocess.run(
        [sys.executable, *(launcher if world > 1 else []), *worker],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode != 0 or not (folder / RECORD).is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("verify-loss: ")]
        message = said[0].removeprefix("verify-loss: ") if said else done.stderr[-2000:]
        kind = InputError if said else EnvironmentFault
        raise kind(f"{world} processes: {message}")
    return array_format.from_bytes((folder / RECORD).read_bytes(), origin=str(folder))


def verify(
    app: Application,
    overrides: Sequence[str],
    worlds: Sequence[int],
    *,
    dtype: str,
    broken: str,
    data: str | None,
    seed: int,
) -> dict[str, Any]:
    """One comparison for each world above 1; ``passed`` when all deviations are within the tolerance."""
    settings = settings_of(app, overrides)
    config = app.configure(settings)
    specification = {"application": app.name, "overrides": settings, "dtype": dtype, "data": data, "seed": seed}
    others = sorted({w for w in worlds if w > 1})
    found = []
    with tempfile.TemporaryDirectory() as temporary, Progress(f"verify-loss {app.name}", len(others) + 1) as bar:
        one = run_world(specification, 1, Path(temporary) / "1")
        bar.update(1, "one process")
        for number, world in enumerate(others, start=2):
            try:
                other = run_world({**specification, "break": broken}, world, Path(temporary) / str(world))
                found.append(compare(one, other, world))
            except InputError as error:
                if not broken:
                    raise
                found.append(Comparison(processes=world, error=error.message))
            bar.update(number, f"{world} processes")
    tolerance = TOLERANCE[dtype]
    return {
        "application": app.name,
        "dtype": dtype,
        "tolerance": tolerance,
        "norm": config.model.norm,
        "parallel": config.pretrain.mesh or config.pretrain.parallel,
        "broken": broken,
        "steps": int(one["losses/each step"].size),
        "comparisons": [{**asdict(c), "passed": c.within(tolerance)} for c in found],
        "passed": all(c.within(tolerance) for c in found),
    }


def chosen_worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1 or max(worlds) > 64 or max(worlds) == 1:
        raise InputError(f"--procs {text!r} is not usable", remedy="write such as 1,2,4; one process is the reference")
    return worlds


def few(data: Any) -> Any:
    """``SAMPLES`` training examples: as few as possible, and a tail batch that does not go around."""
    if len(data.train) < SAMPLES:
        raise DataError(
            f"{len(data.train)} training examples; verify-loss needs {SAMPLES}",
            remedy="choose more data with --data or --set",
        )
    return data.train.take(slice(0, SAMPLES))
