"""Predicted against measured memory: ``fieldfleet estimate`` beside the peak resident growth of a fresh process.

    python -m benchmarks estimate [--quick]

Each case trains three steps in its own process with the very Trainer of ``pretrain``, on examples of ones, of the application's shapes. The process
notes its resident memory before the trainer is made and the highest it has after (VmHWM).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_core.learning.application import application


@dataclass(frozen=True)
class Case:
    application: str
    overrides: tuple[str, ...]


LEAF = ("model.width=64", "pretrain.batch_size=64")
VOLUME = ("data.crop=64", "data.stride=64", "model.width=16", "data.reference=stored")
AGAIN = "pretrain.activation_checkpointing=true"
CASES = (
    Case("plant_disease", ("model.width=32", "model.blocks=2", "pretrain.batch_size=96")),
    Case("plant_disease", LEAF),
    Case("plant_disease", ("model.width=96", "model.blocks=2", "pretrain.batch_size=16")),
    Case("plant_disease", (*LEAF, "optimizer.name=sgd", "optimizer.momentum=0.9")),
    Case("driver_conflict", ("model.width=256", "model.blocks=4", "pretrain.batch_size=1024")),
    Case("plant_disease", ("model.width=64", "pretrain.batch_size=96", AGAIN)),
    Case("plant_disease", ("model.width=96", "model.norm=group", "pretrain.batch_size=64", "pretrain.micro_batch=16")),
    Case("seismic_facies", (*VOLUME, "pretrain.batch_size=3")),
    Case("seismic_facies", (*VOLUME, "pretrain.batch_size=3", AGAIN)),
    Case(
        "seismic_facies",
        (*VOLUME, "model.width=24", "model.norm=group", "pretrain.batch_size=4", "pretrain.micro_batch=2", AGAIN),
    ),
)


def measured(case: Case, procs: int = 1, preset: str = "default") -> float:
    """Bytes: the most of any process, each a fresh one."""
    from hpc_trainer.performance.estimate import target_of
    from hpc_trainer.performance.worker import start

    like = target_of(application(case.application), preset, case.overrides)
    spec = {
        "work": "peak",
        "application": case.application,
        "preset": preset,
        "overrides": list(case.overrides),
        "target": [list(like.shape[1:]), str(like.dtype).removeprefix("torch.")],
        "seed": 0,
        "dtype": "float32",
        "steps": 3,
    }
    with tempfile.TemporaryDirectory() as folder:
        return float(max(rank["peak"] for rank in start(spec, procs, Path(folder))))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks estimate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--cases", nargs="+", type=int, metavar="N", help="only these, counted from 0")
    args = parser.parse_args(arguments)
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
