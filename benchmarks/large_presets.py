"""The large presets really train: 20 steps of over 100 million parameters on 2 processes, the peak beside the estimate.

    python -m benchmarks large_presets [--quick] [--procs 2] [--steps 20]

One 2-D and two 3-D applications under FSDP2 (parameters, gradients and AdamW's moments cut over the processes), on small crops of generated
data, so that a machine of two cores ends in minutes: what makes these models large is parameters. Printed: the loss of the first and the last
steps, seconds a step, and the highest resident memory of a process during the steps beside what ``fieldfleet estimate`` predicts for it.
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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from fl_core.learning.application import application
from fl_core.learning.sources import GENERATED, open_data
from fl_core.runtime.machine import resident_bytes
from fl_core.storage import atomic


@dataclass(frozen=True)
class Case:
    application: str
    batch: int
    overrides: tuple[str, ...]


CASES = (
    Case("plant_disease", 8, ("data.image_size=32", "data.clients=4", "data.images_per_client=10")),
    Case(
        "seismic_facies",
        2,
        (
            *("data.crop=16", "data.stride=16", "data.inlines=32", "data.crosslines=32", "data.samples=32"),
            *("data.clients=3", "data.volumes_per_client=2", "data.reference=stored"),
        ),
    ),
    Case(
        "topology_optimisation",
        2,
        ("data.size=32", "data.clients=3", "data.problems_per_client=8", "data.iterations=6", "data.judged=0"),
    ),
)
EXAMPLES = 24  # few, so that twenty steps see each of them several times


def settings(case: Case, parallel: str, mesh: str) -> list[str]:
    made = [
        *case.overrides,
        *(
            f"pretrain.batch_size={case.batch}",
            f"pretrain.parallel={parallel}",
            "pretrain.epochs=1000",
            "pretrain.checkpoint_every=1000",
        ),
        *("pretrain.schedule=constant", "pretrain.warmup_fraction=0", "optimizer.lr=0.000003"),
    ]
    return [*made, *([f"pretrain.mesh={mesh}"] if mesh else [])]


def child(path: Path) -> None:
    """One rank: trains, and writes what it saw."""
    from hpc_trainer.commands import training_data
    from hpc_trainer.performance import worker  # noqa: F401  what an arrangement imports is no part of what it holds
    from hpc_trainer.performance.phase_clock import EnoughSteps, PhaseClock
    from hpc_trainer.processes import join
    from hpc_trainer.trainer import Trainer

    spec = json.loads(path.read_text())
    torch.set_num_threads(1)
    processes = join()
    app = application(spec["application"])
    config = app.configure(spec["overrides"], preset=spec["preset"])
    data = training_data(app, config, open_data(app, config, GENERATED, seed=0), 0)
    some = min(EXAMPLES, len(data.train))
    data = replace(data, train=data.train.take(slice(0, some)), validation=data.validation.take([]))
    clock = PhaseClock(spec["steps"])
    before = resident_bytes()

    def on_step(step: int, total: int, loss: float) -> None:
        print(f"{app.name}: step {step}, loss {loss:.4f}", file=sys.stderr, flush=True)

    out = path.parent / "run"
    trainer = Trainer(app, config, data, processes=processes, out=out, seed=0, phase=clock, on_step=on_step)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # steps are measured, not how the model was made
    with contextlib.suppress(EnoughSteps):
        trainer.run()
    found = {
        "losses": trainer.losses,
        "seconds": [step.seconds for step in clock.steps],
        "peak": resident_bytes("VmHWM") - before,
        "parameters": sum(p.numel() for p in app.build_model(config).parameters()) if processes.is_main else 0,
    }
    atomic.write_json(path.parent / f"rank-{processes.rank}.json", found)
    processes.close()


def measured(case: Case, preset: str, *, procs: int, steps: int, parallel: str, mesh: str) -> list[dict[str, Any]]:
    from hpc_trainer.performance.worker import ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder:
        spec = {"application": case.application, "preset": preset, "steps": steps}
        spec["overrides"] = settings(case, parallel, mesh)
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        command = [
            *(sys.executable, "-m", "hpc_trainer.launch", "--nnodes", "1", "--nproc-per-node", str(procs)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
            *("-m", "benchmarks.large_presets", "--child", str(path)),
        ]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(procs)]


@dataclass(frozen=True)
class Result:
    """peak, predicted: bytes of a process."""

    parameters: int
    losses: list[float]
    seconds: float
    peak: int
    predicted: int

    @property
    def last(self) -> float:
        """Mean of the last five: at batches of four a single one says little."""
        return fmean(self.losses[-5:])

    @property
    def falls(self) -> bool:
        """Below where it began, and below the mean of the first five."""
        return self.last < min(self.losses[0], fmean(self.losses[:5]))


def result(case: Case, preset: str, *, procs: int, steps: int) -> Result:
    from hpc_trainer.performance.estimate import estimate

    ranks = measured(case, preset, procs=procs, steps=steps, parallel="fsdp", mesh="")
    overrides = settings(case, "fsdp", "")
    predicted = estimate(application(case.application), preset, overrides, world=procs, parallel="fsdp")
    return Result(
        ranks[0]["parameters"],
        ranks[0]["losses"],
        median(ranks[0]["seconds"]),
        max(rank["peak"] for rank in ranks),
        predicted["memory_bytes"]["total"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks large_presets", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the default presets, 4 steps")
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--app", help="only this application")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child)
        return 0
    preset, steps = ("default", 4) if args.quick else ("large", args.steps)
    passed = True
    for case in CASES:
        if args.app and case.application != args.app:
            continue
        found = result(case, preset, procs=args.procs, steps=steps)
        passed = passed and (found.falls or args.quick)
        print(
            f"{case.application} {preset}: {found.parameters:,} parameters, fsdp on {args.procs} processes, {len(found.losses)} steps: "
            f"loss {found.losses[0]:.4f} -> {found.last:.4f} (the first, mean of the last 5), {found.seconds:.2f} s a step; "
            f"peak {found.peak / 1e6:,.0f} MB, estimate {found.predicted / 1e6:,.0f} MB ({100 * (found.predicted / found.peak - 1):+.1f} %)",
            flush=True,
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
