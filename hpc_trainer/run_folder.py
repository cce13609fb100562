"""A training run's folder: checkpoints by (epoch, step), the newest to go on from, and the final model.

    epoch-00004/                the end of epoch 4
    epoch-00004-step-00120/     120 steps into epoch 5
    final/  latest -> final     history.jsonl

Checkpoints are written in the background, from copies; each is wholly there or not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import describes, to_table
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning.application import Application
from fl_core.storage import atomic
from hpc_trainer.processes import Processes

STATE_NAME = "training.safetensors"
PROGRESS = "progress"
KEPT = 2
# Keys of [pretrain] that decide where and how fast the same training runs; a run may go on with others.
FREE = (
    *("parallel", "mesh", "spatial_axis", "schedule_of_stages", "micro_batch", "activation_checkpointing", "compile"),
    *("checkpoint_every", "checkpoint_steps"),
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """epoch: whole epochs done; step: steps done in the next one, with its losses' sums so far."""

    epoch: int
    step: int = 0
    numerator: float = 0.0
    denominator: float = 0.0

    def after_step(self, sums: Tensor) -> Progress:
        return replace(
            self,
            step=self.step + 1,
            numerator=self.numerator + float(sums[0]),
            denominator=self.denominator + float(sums[1]),
        )

    @property
    def name(self) -> str:
        return f"epoch-{self.epoch:05d}" + (f"-step-{self.step:05d}" if self.step else "")


@dataclass(frozen=True, kw_only=True)
class Found:
    progress: Progress
    arrays: Arrays
    state: Arrays
    origin: str


class RunFolder:
    def __init__(
        self,
        path: Path,
        application: Application,
        config: Any,
        clients: tuple[str, ...],
        seed: int,
        processes: Processes,
    ) -> None:
        self.path, self.processes = path, processes
        self.application, self.config, self.clients, self.seed = application, config, clients, seed
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, progress: Progress, arrays: Arrays, state: Arrays, metrics: dict[str, float]) -> None:
        """Returns at once; an error of the previous write is raised here. ``arrays`` and ``state`` are copies."""
        if not self.processes.is_main:
            return
        self.wait()
        facts = np.array([progress.epoch, progress.step, progress.numerator, progress.denominator])
        made = Checkpoint(
            self._manifest(progress.epoch, metrics),
            arrays,
            {STATE_NAME: array_format.to_bytes({**state, PROGRESS: facts})},
        )
        self._pending = self._writer.submit(self._write, progress.name, made)

    def _write(self, name: str, made: Checkpoint) -> None:
        made.save(self.path / name)
        atomic.point_to(self.path / checkpoints.LATEST, name)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def wait(self) -> None:
        """Until what was saved lies on the disk; raises the error with which it does not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self, epochs: int, arrays: Arrays, metrics: dict[str, float]) -> Path:
        self.wait()
        if self.processes.is_main:
            Checkpoint(self._manifest(epochs, metrics), arrays).save(self.path / "final")
            atomic.point_to(self.path / checkpoints.LATEST, "final")
        self.processes.barrier()
        return self.path / "final"

    def newest(self) -> Found | None:
        """Raises ConfigError when the run in this folder is another one."""
        folders = self._all()
        if not folders:
            return None
        last = checkpoints.load(folders[-1], with_state=True)
        if last.manifest.seed != self.seed or not self._is_of(last.manifest.config):
            raise ConfigError(
                f"{self.path}: holds a run with another configuration or seed",
                remedy="name a new --out folder, or repeat the command that began this run",
            )
        origin = str(folders[-1])
        state = dict(array_format.from_bytes(last.state[STATE_NAME], origin=origin))
        epoch, step, numerator, denominator = state.pop(PROGRESS, np.array([last.manifest.step, 0, 0, 0])).tolist()
        progress = Progress(epoch=int(epoch), step=int(step), numerator=numerator, denominator=denominator)
        return Found(progress=progress, arrays=last.arrays, state=state, origin=origin)

    def _is_of(self, table: Mapping[str, Any]) -> bool:
        """Whether a run of this configuration wrote it, whatever it said of what may change between two starts."""
        pretrain, now = dict(table.get("pretrain", {})), to_table(self.config.pretrain)
        free = {key: now[key] for key in FREE if key in now}
        return describes({**table, "pretrain": {**pretrain, **free}}, self.config)

    def _all(self) -> list[Path]:
        return sorted(p for p in self.path.glob("epoch-*") if p.is_dir())

    def _manifest(self, epoch: int, metrics: dict[str, float]) -> CheckpointManifest:
        return CheckpointManifest(
            application=self.application.name,
            config=to_table(self.config),
            stage="pretrain",
            step=epoch,
            seed=self.seed,
            clients_seen=list(self.clients),
            metrics=metrics,
            versions={"torch": torch.__version__},
        )
