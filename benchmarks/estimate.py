"""Predicted against measured memory: ``fieldfleet estimate`` beside the peak resident growth of a fresh process.

    python -m benchmarks estimate [--quick]

Each case trains three steps in its own process with the very Trainer of ``pretrain``, on examples of ones, of the application's shapes. The process
notes its resident memory before the trainer is made and the highest it has after (VmHWM). It imports what training does and nothing of the
estimate's own tools: those would make libraries resident beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fl_core.learning.application import application
from fl_core.runtime.machine import resident_bytes
from hpc_trainer.performance.phase_clock import EnoughSteps, PhaseClock
from hpc_trainer.performance.stand_in import stand_in
from hpc_trainer.processes import join
from hpc_trainer.trainer import Trainer, TrainingData


@dataclass(frozen=True)
class Case:
    application: str
    overrides: tuple[str, ...]


LEAF = ("model.width=64", "pretrain.batch_size=64")
VOLUME = ("data.crop=64", "data.stride=64", "model.width=16", "data.reference=stored")
AGAIN = "pretrain.activation_checkpointing=true"
CASES = (
    Case("plant_disease", ("model.width=32", "model.blocks=2", "pretrain.batch_size=64")),
    Case("plant_disease", LEAF),
    Case("plant_disease", ("model.width=96", "model.blocks=2", "pretrain.batch_size=16")),
    Case("plant_disease", ("model.width=64", "pretrain.batch_size=32", "optimizer.name=sgd", "optimizer.momentum=0.9")),
    Case("driver_conflict", ("model.width=256", "model.blocks=4", "pretrain.batch_size=4096")),
    Case("plant_disease", (*LEAF, AGAIN)),
    Case("plant_disease", ("model.width=96", "model.norm=group", "pretrain.batch_size=64", "pretrain.micro_batch=16")),
    Case("seismic_facies", (*VOLUME, "pretrain.batch_size=3")),
    Case("seismic_facies", (*VOLUME, "pretrain.batch_size=3", AGAIN)),
    Case(
        "seismic_facies",
        (*VOLUME, "model.width=24", "model.norm=group", "pretrain.batch_size=4", "pretrain.micro_batch=2", AGAIN),
    ),
)
SETTINGS = (
    *("pretrain.epochs=1000", "pretrain.checkpoint_every=1000", "pretrain.average_last=0"),
    *("pretrain.schedule=constant", "pretrain.warmup_fraction=0"),
)


def measured(case: Case) -> float:
    """Bytes, from a process of its own."""
    from hpc_trainer.performance.estimate import target_of
    from hpc_trainer.performance.worker import ENVIRONMENT

    like = target_of(application(case.application), "default", case.overrides)
    shape = json.dumps([list(like.shape[1:]), str(like.dtype).removeprefix("torch.")])
    command = [sys.executable, "-m", "benchmarks.estimate", "--child", case.application, shape, *case.overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    return float(json.loads(done.stdout))


def child(name: str, like: str, overrides: Sequence[str]) -> None:
    torch.set_num_threads(1)
    shape, dtype = json.loads(like)
    app = application(name)
    config = app.configure([*overrides, *SETTINGS])
    examples = stand_in(app, config, shape, dtype)
    data = TrainingData(train=examples, validation=examples.take([]), clients=("client",))
    clock = PhaseClock(3)
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = resident_bytes()
        with contextlib.suppress(EnoughSteps):
            Trainer(app, config, data, processes=join(), out=Path(folder), seed=0, phase=clock).run()
    assert len(clock.steps) == 3
    print(resident_bytes("VmHWM") - before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks estimate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--cases", nargs="+", type=int, metavar="N", help="only these, counted from 0")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child[0], args.child[1], args.child[2:])
        return 0
    from hpc_trainer.performance.estimate import estimate

    for case in [CASES[n] for n in args.cases] if args.cases else CASES[: 1 if args.quick else None]:
        predicted = estimate(application(case.application), "default", case.overrides, world=1, parallel="ddp")
        total, real = predicted["memory_bytes"]["total"], measured(case)
        print(
            f"{case.application} {' '.join(case.overrides)}: predicted {total / 1e6:.0f} MB, measured {real / 1e6:.0f} MB, "
            f"{100 * (total / real - 1):+.1f} %",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
