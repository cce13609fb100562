"""One rank of a measurement, started by torchrun: ``python -m hpc_trainer.performance.worker SPEC.json``.

The spec names the measurement and where results go; every rank writes its own, and whoever started them reads them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP and recomputation import it when they are first used: not what a run holds, so before any measurement

from fl_core.contracts.errors import EnvironmentFault
from fl_core.contracts.offswitches import set_off_switches
from fl_core.learning.application import application
from fl_core.learning.sources import open_data
from fl_core.storage import atomic
from hpc_trainer import phases
from hpc_trainer.commands import training_data
from hpc_trainer.performance import probe
from hpc_trainer.performance.phase_clock import EnoughSteps, PeakMemory, PhaseClock
from hpc_trainer.performance.stand_in import stand_in
from hpc_trainer.placement import channels, sharded, stages  # noqa: F401  as above
from hpc_trainer.processes import Processes, join
from hpc_trainer.trainer import Trainer, TrainingData

# Large blocks go back to the system when they are freed, so that resident memory is what is held.
CHECKPOINTS = 3
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def start(spec: dict[str, Any], procs: int, folder: Path) -> list[dict[str, Any]]:
    """Runs ``spec`` with ``procs`` processes on this machine; returns each rank's result. Raises EnvironmentFault."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.json"
    atomic.write_json(path, {**spec, "folder": str(folder)})
    command = [
        *(sys.executable, "-m", "hpc_trainer.launch", "--nnodes", "1", "--nproc-per-node", str(procs)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", "hpc_trainer.performance.worker", str(path)),
    ]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT, **spec.get("environment", {})}, stdout=subprocess.PIPE, text=True
    )
    files = [folder / f"rank-{rank}.json" for rank in range(procs)]
    if done.returncode or not all(f.is_file() for f in files):
        raise EnvironmentFault(f"a measuring process of {procs} ended with {done.returncode}; its message is above")
    return [json.loads(f.read_text()) for f in files]


def trainer_of(spec: dict[str, Any], processes: Processes, folder: Path, clock: PhaseClock) -> Trainer:
    app = application(spec["application"])
    # as many epochs as it takes; the learning rate must not depend on how many
    config = app.configure(
        [
            *spec["overrides"],
            *("pretrain.epochs=100000", "pretrain.checkpoint_every=100000", "pretrain.average_last=0"),
            *("pretrain.schedule=constant", "pretrain.warmup_fraction=0"),
        ],
        preset=spec["preset"],
    )
    if "target" in spec:
        examples = stand_in(app, config, *spec["target"])
        data = TrainingData(train=examples, validation=examples.take([]), clients=("client",))
    else:
        data = training_data(app, config, open_data(app, config, spec["data"], seed=spec["seed"]), spec["seed"])
        data = replace(data, validation=data.validation.take([]))  # steps are measured, not epochs
    trainer = Trainer(
        app,
        config,
        data,
        processes=processes,
        out=folder / "run",
        seed=spec["seed"],
        dtype=getattr(torch, spec["dtype"]),
        phase=clock,
    )
    clock.watch(trainer.model)
    return trainer


def steps(spec: dict[str, Any], processes: Processes, folder: Path) -> dict[str, Any]:
    """Training steps under a clock."""
    clock = PhaseClock(spec["steps"])
    trainer = trainer_of(spec, processes, folder, clock)
    with contextlib.suppress(EnoughSteps):
        trainer.run()
    clock.write_trace(folder / f"trace-rank-{processes.rank}.json", processes.rank)
    return {**clock.document(spec["skip"]), "losses": trainer.losses, "examples": len(trainer.data.train)}


def profile(spec: dict[str, Any], processes: Processes, folder: Path) -> dict[str, Any]:
    """The same with the memory of each stage; then checkpoints, each until it lies on the disk."""
    clock = PhaseClock(spec["steps"], memory=True)
    trainer = trainer_of(spec, processes, folder, clock)
    with contextlib.suppress(EnoughSteps):
        trainer.run()
    memory, base = PeakMemory(), PeakMemory().now()
    seconds, held = [], []
    for _ in range(CHECKPOINTS):
        memory.reset()
        begin = time.perf_counter()
        trainer.checkpoint()
        seconds.append(time.perf_counter() - begin)
        held.append(memory.peak() - base)
    found = clock.document(spec["skip"])
    kept = clock.steps[spec["skip"] :]
    return {
        "stages": {**found["stages"], phases.CHECKPOINT: seconds},
        "memory": {
            **{name: [s.memory.get(name, 0) for s in kept] for name in kept[0].memory},
            phases.CHECKPOINT: held,
        },
    }


def peak(spec: dict[str, Any], processes: Processes, folder: Path) -> dict[str, Any]:
    """By how much resident memory grows at most, from before the model is made; (on a GPU, torch's allocations)."""
    memory = PeakMemory()
    memory.reset()
    before = memory.now()
    clock = PhaseClock(spec["steps"])
    with contextlib.suppress(EnoughSteps):
        trainer_of(spec, processes, folder, clock).run()
    return {"peak": memory.peak() - before, "seconds": [s.seconds for s in clock.steps]}


def all_reduce(spec: dict[str, Any], processes: Processes, folder: Path) -> dict[str, Any]:
    return probe.all_reduce(processes, spec["largest"], spec["seconds"])


WORK = {"steps": steps, "profile": profile, "peak": peak, "all_reduce": all_reduce}


def main() -> None:
    set_off_switches()
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(spec["folder"])
    processes = join()
    try:
        torch.set_num_threads(spec.get("threads", 1))
        atomic.write_json(folder / f"rank-{processes.rank}.json", WORK[spec["work"]](spec, processes, folder))
    finally:
        processes.close()


if __name__ == "__main__":
    main()
