"""One rank of float64 training runs, started under torchrun by the tests: ``ranks.py SPEC.json SPEC.json ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fl_core.learning.application import application
from fl_core.learning.sources import GENERATED, open_data
from hpc_trainer.commands import training_data
from hpc_trainer.processes import Processes, join
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


def main() -> None:
    processes = join()
    try:
        for path in map(Path, sys.argv[1:]):
            losses = train(json.loads(path.read_text()), processes, path.parent)
            if processes.is_main:
                (path.parent / "losses.json").write_text(json.dumps(losses))
    finally:
        processes.close()


if __name__ == "__main__":
    main()
