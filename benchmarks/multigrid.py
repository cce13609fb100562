"""Coarse-to-fine training against direct training of one voxel model, at equal final validation loss: seconds of both, and their ratio.

    python -m benchmarks multigrid [--app seismic_facies] [--coarse 2:0.5] [--epochs 16] [--coarse-epochs N] [--seeds 3] [--quick]

Both begin with the same weights, the same constant learning rate, batches and optimiser, on one core; the one sees its first steps at lower resolution
(``pretrain.coarse``), and may take more epochs, which cost it less. Validation is at full resolution in both, after each epoch, and not timed; seconds are the process's. The target is the lowest
validation loss of the direct run; timed is each one's way to the first epoch that reaches it. The orders of the two runs alternate from seed to seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fl_core.learning.application import application
from fl_core.learning.sources import GENERATED, open_data
from hpc_trainer.commands import training_data
from hpc_trainer.processes import Processes
from hpc_trainer.trainer import EpochRecord, Trainer

ALONE = Processes(0, 1, torch.device("cpu"))
SMALL = {
    "seismic_facies": (
        *("data.clients=6", "data.volumes_per_client=2", "data.reference=stored", "data.in_memory_mb=1024"),
        *("pretrain.batch_size=4", "data.validation_fraction=0.5", "data.holdout_fraction=0.0"),
    ),
    "topology_optimisation": (
        *("data.clients=8", "data.problems_per_client=8", "data.iterations=12", "data.judged=0"),
        *("pretrain.batch_size=8", "data.holdout_fraction=0.0", "data.validation_fraction=0.25"),
    ),
}
FIXED = (
    "pretrain.schedule=constant",
    "pretrain.warmup_fraction=0",
    "pretrain.average_last=0",
    "pretrain.checkpoint_every=1000",
)


def train(app: Any, overrides: Sequence[str], found: Any, seed: int) -> list[tuple[float, float]]:
    """(processor seconds of training so far, validation loss) after each epoch."""
    config = app.configure(overrides)
    curve: list[tuple[float, float]] = []
    seconds = began = 0.0

    def on_step(step: int, total: int, loss: float) -> None:
        nonlocal seconds, began
        seconds, began = seconds + time.process_time() - began, time.process_time()

    def on_epoch(record: EpochRecord) -> None:
        nonlocal began
        curve.append((seconds, record.validation["loss"]))
        began = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        data = training_data(app, config, found, 0)
        trainer = Trainer(
            app, config, data, processes=ALONE, out=Path(folder), seed=seed, on_epoch=on_epoch, on_step=on_step
        )
        began = time.process_time()
        trainer.run()
    return curve


def reached(curve: Sequence[tuple[float, float]], target: float) -> tuple[float, int] | None:
    """(seconds, epoch) of the first epoch with at most ``target``."""
    return next(((seconds, n) for n, (seconds, loss) in enumerate(curve, start=1) if loss <= target), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks multigrid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three epochs, one seed")
    parser.add_argument("--app", default="seismic_facies", choices=sorted(SMALL))
    parser.add_argument("--coarse", default="2:0.5")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument(
        "--coarse-epochs", type=int, metavar="N", help="of the run from coarse to fine (default: as many)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    app = application(args.app)
    epochs, seeds = (3, 1) if args.quick else (args.epochs, args.seeds)
    base = [*SMALL[args.app], *FIXED, f"pretrain.epochs={epochs}", *args.overrides]
    found = open_data(app, app.configure(base), GENERATED, seed=0)
    ratios, missed = [], 0
    for seed in range(seeds):
        longer = f"pretrain.epochs={args.coarse_epochs or epochs}"
        runs = {"direct": base, "coarse to fine": [*base, longer, f"pretrain.coarse={args.coarse}"]}
        names = list(runs) if seed % 2 == 0 else list(runs)[::-1]
        curves = {name: train(app, runs[name], found, seed) for name in names}
        target = min(loss for _, loss in curves["direct"])
        direct, coarse = (reached(curves[name], target) for name in runs)
        assert direct is not None
        last = {name: f"{curve[-1][1]:.4f} after {curve[-1][0]:.1f} s" for name, curve in curves.items()}
        print(
            f"seed {seed}: validation loss {target:.4f} reached directly in {direct[0]:.1f} s (epoch {direct[1]}), coarse to fine "
            f"{f'in {coarse[0]:.1f} s (epoch {coarse[1]}), {direct[0] / coarse[0]:.2f} times faster' if coarse else 'not'}; "
            f"at the end: direct {last['direct']}, coarse to fine {last['coarse to fine']}",
            flush=True,
        )
        if coarse:
            ratios.append(direct[0] / coarse[0])
        else:
            missed += 1
    if ratios:
        print(
            f"{args.app}, {args.coarse}: median of {len(ratios)} seeds {median(ratios):.2f} times faster at equal loss; not reached in {missed}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
