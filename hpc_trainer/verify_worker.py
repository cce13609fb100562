"""One process of ``verify-loss``: ``python -m hpc_trainer.verify_worker FOLDER...`` trains as FOLDER/specification.json says.

The Trainer, data path and process group are those of ``fieldfleet pretrain``; here only what they do is written down.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_core.contracts import arrays as array_format
from fl_core.contracts.errors import FieldfleetError
from fl_core.contracts.offswitches import set_off_switches
from fl_core.learning.application import application
from fl_core.learning.sources import open_data
from fl_core.storage import atomic
from hpc_trainer.commands import training_data
from hpc_trainer.processes import Processes, join
from hpc_trainer.recipe import BROKEN, RIGHT
from hpc_trainer.trainer import EpochRecord, Trainer
from hpc_trainer.verify import RECORD, few


class Recorder:
    """kind/name -> array; collected on every process, kept by the main one."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {}
        self.validation: list[float] = []

    def gradients(self, step: int, trainer: Trainer) -> None:
        last = trainer.steps * trainer.config.pretrain.epochs - 1
        if step in (0, last) or (step + 1) % trainer.steps == 0:
            found = trainer.placement.gradients()
            self.table |= {f"gradients/{name} in step {step + 1}": g for name, g in found.items()}

    def epoch(self, record: EpochRecord) -> None:
        self.validation.append(record.validation.get("loss", 0.0))

    def finish(self, trainer: Trainer) -> None:
        parameters = {name for name, _ in trainer.model.named_parameters()}
        for name, value in trainer.placement.arrays().items():
            kind = "weights" if name in parameters else "statistics"
            if value.dtype.kind == "f":
                self.table[f"{kind}/{name}"] = value
        self.table["losses/each step"] = np.array(trainer.losses)
        self.table["validation/each epoch"] = np.array(self.validation)


def train(specification: dict[str, Any], processes: Processes, folder: Path) -> None:
    app = application(specification["application"])
    config = app.configure(specification["overrides"])
    found = open_data(app, config, specification["data"], seed=specification["seed"])
    data = training_data(app, config, found, specification["seed"])
    recorder = Recorder()
    trainer = Trainer(
        app,
        config,
        replace(data, train=few(data)),
        processes=processes,
        out=folder / "run",
        seed=specification["seed"],
        dtype=getattr(torch, specification["dtype"]),
        recipe=BROKEN.get(specification.get("break", ""), RIGHT),
        on_epoch=recorder.epoch,
        on_gradients=recorder.gradients,
    )
    trainer.run()
    recorder.finish(trainer)
    if processes.is_main:
        atomic.write_bytes(folder / RECORD, array_format.to_bytes(recorder.table))


def train_all(processes: Processes, *folders: Path) -> None:
    for folder in folders:
        train(json.loads((folder / "specification.json").read_text()), processes, folder)


def main() -> int:
    set_off_switches()
    torch.set_num_threads(1)
    processes = join()
    try:
        train_all(processes, *map(Path, sys.argv[1:]))
    except FieldfleetError as error:
        print(f"verify-loss: {error.message}", file=sys.stderr)
        return int(error.exit_code)
    finally:
        processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
