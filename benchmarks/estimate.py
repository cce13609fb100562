"""Predicted against measured memory: ``fieldfleet estimate`` beside the peak resident growth of a fresh process.

    python -m benchmarks.estimate [--quick]

Each case trains three steps of one application's model in its own process, which notes its resident memory before the
model is made and the highest it has after (VmHWM). It imports what training does and nothing of the estimate's own tools:
those would make libraries resident beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fl_core.learning.application import application
from fl_core.optimizers import build_optimizer


@dataclass(frozen=True)
class Case:
    application: str
    overrides: tuple[str, ...]


CASES = (
    Case("plant_disease", ("model.width=32", "model.blocks=2", "pretrain.batch_size=64")),
    Case("plant_disease", ("model.width=64", "pretrain.batch_size=64")),
    Case("plant_disease", ("model.width=96", "model.blocks=2", "pretrain.batch_size=16")),
    Case("plant_disease", ("model.width=64", "pretrain.batch_size=32", "optimizer.name=sgd", "optimizer.momentum=0.9")),
    Case("driver_conflict", ("model.width=256", "model.blocks=4", "pretrain.batch_size=4096")),
)


def measured(case: Case) -> float:
    """Bytes, from a process of its own."""
    from hpc_trainer.performance.estimate import _targets
    from hpc_trainer.performance.worker import ENVIRONMENT

    like = _targets(application(case.application), "default", case.overrides)
    shape = json.dumps([list(like.shape[1:]), str(like.dtype).removeprefix("torch.")])
    command = [sys.executable, "-m", "benchmarks.estimate", "--child", case.application, shape, *case.overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    return float(json.loads(done.stdout))


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def child(name: str, like: str, overrides: Sequence[str]) -> None:
    torch.set_num_threads(1)
    shape, dtype = json.loads(like)
    app = application(name)
    config = app.configure(overrides)
    size = config.pretrain.batch_size
    loss = app.loss_function()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = resident("VmRSS")
    model = app.build_model(config)
    optimizer = build_optimizer(model, config.optimizer)
    inputs = [torch.ones((size, *s.shape[1:])).to(getattr(torch, s.dtype)) for s in app.inputs(config)]
    targets = torch.zeros((size, *shape), dtype=getattr(torch, dtype))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        numerator, denominator = loss(model(*inputs), targets, config)
        (numerator / denominator).backward()
        optimizer.step()
    print(resident("VmHWM") - before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child[0], args.child[1], args.child[2:])
        return 0
    from hpc_trainer.performance.estimate import estimate

    for case in CASES[: 1 if args.quick else None]:
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
