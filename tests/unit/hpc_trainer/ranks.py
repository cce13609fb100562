"""Training runs in float64, alone or as one rank of several.

A specification may name a run's folder under ``from``: training goes on from its checkpoint of epoch ``at``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fl_core.learning.application import application
from fl_core.learning.sources import GENERATED, open_data
from hpc_trainer.commands import training_data
from hpc_trainer.processes import Processes
from hpc_trainer.trainer import EpochRecord, Trainer

ALONE = Processes(0, 1, torch.device("cpu"))


def train(spec: dict[str, Any], processes: Processes, out: Path, *, stop_after: int = 0) -> list[float]:
    """Losses of all steps; the checkpoint lies under ``out``."""
    torch.set_num_threads(1)
    app = application(spec["application"])
    config = app.configure(spec["overrides"])
    data = training_data(app, config, open_data(app, config, GENERATED, seed=0), 0)

    def on_epoch(record: EpochRecord) -> None:
        if record.epoch == stop_after:
            raise InterruptedError

    dtype = getattr(torch, spec["dtype"])
    trainer = Trainer(app, config, data, processes=processes, out=out, seed=0, dtype=dtype, on_epoch=on_epoch)
    trainer.run()
    return trainer.losses


def take_up(run: Path, epoch: int, out: Path) -> None:
    """``out`` becomes ``run`` as it was when that epoch's checkpoint was its newest."""
    name = f"epoch-{epoch:05d}"
    shutil.copytree(run / name, out / name)


def train_each(processes: Processes, *files: Path) -> None:
    """A rank's part in the run of each specification, one after the other; checkpoints and ``losses.json`` lie beside it."""
    for path in files:
        spec = json.loads(path.read_text())
        if processes.is_main and "from" in spec:
            take_up(Path(spec["from"]), spec["at"], path.parent)
        processes.barrier()
        losses = train(spec, processes, path.parent)
        if processes.is_main:
            (path.parent / "losses.json").write_text(json.dumps(losses))
