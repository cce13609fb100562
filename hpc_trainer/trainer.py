"""Data-parallel training whose loss does not depend on how many processes ran it.

One global batch size; this rank's share of each global batch; losses as (numerator, denominator) with the
denominator summed over all ranks BEFORE the backward pass; gradients SUMMED, not averaged; evaluation by global
sums; augmentation keyed by (seed, epoch, example). A rank whose share of a batch is empty takes part with one
example of weight zero, since DDP waits for every rank.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import ConfigError, IntegrityError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning import seeding
from fl_core.learning.application import Application
from fl_core.learning.averaging import ModelAverage
from fl_core.learning.examples import Examples
from fl_core.learning.local_update import augmented
from fl_core.learning.torch_arrays import get_arrays, predict, set_arrays, tensors
from fl_core.optimizers import build_optimizer
from fl_core.storage import atomic
from fl_core.storage.log import AppendLog, read_log
from hpc_trainer import optimizer_state, phases
from hpc_trainer.gradients import data_parallel
from hpc_trainer.processes import Processes
from hpc_trainer.sampler import global_batches, steps_per_epoch
from hpc_trainer.schedules import learning_rate

log = logging.getLogger(__name__)
STATE_NAME = "training.safetensors"
HISTORY_NAME = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """loss: mean over all examples of the epoch; validation: loss and metrics on groups never trained on."""

    epoch: int
    loss: float
    validation: dict[str, float]
    seconds: float
    examples_per_second: float


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    train: Examples
    validation: Examples
    clients: tuple[str, ...]


class Trainer:
    """Trains one application; ``run()`` returns the folder of the final checkpoint (written by rank 0)."""

    def __init__(
        self,
        application: Application,
        config: Any,
        data: TrainingData,
        *,
        processes: Processes,
        out: Path,
        seed: int,
        dtype: torch.dtype = torch.float32,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
        phase: phases.Phases = phases.unobserved,
    ) -> None:
        refuse_local_batch_norm(config, processes.world)
        self.application, self.config, self.data = application, config, data
        self.processes, self.out, self.seed, self.dtype = processes, out, seed, dtype
        self.on_epoch, self.on_step, self.phase = on_epoch, on_step, phase
        self.model: nn.Module = application.build_model(config).to(device=processes.device, dtype=dtype)
        self.wrapped = data_parallel(self.model, processes.world)
        self.optimizer = build_optimizer(self.model, config.optimizer, processes.group)
        self.base_lr = config.pretrain.lr or config.optimizer.lr
        self.average = ModelAverage(config.pretrain.average_last, config.pretrain.epochs)
        self.loss_function, self.augment = application.loss_function(), application.augment_function()
        self.steps = steps_per_epoch(len(data.train), config.pretrain.batch_size)
        self.losses: list[float] = []  # the global loss of every step
        self.done = self._resume()

    def run(self) -> Path:
        history = AppendLog(self.out / HISTORY_NAME) if self.processes.is_main else None
        try:
            self._epochs(history)
            return self._finish()
        finally:
            if history is not None:
                history.close()

    def _epochs(self, history: AppendLog | None) -> None:
        for epoch in range(self.done + 1, self.config.pretrain.epochs + 1):
            began = time.monotonic()
            loss = self._epoch(epoch)
            seconds = time.monotonic() - began
            record = EpochRecord(
                epoch=epoch,
                loss=loss,
                validation=self.evaluate(self.data.validation),
                seconds=seconds,
                examples_per_second=len(self.data.train) / seconds,
            )
            self.average.add(epoch, get_arrays(self.model))
            if history is not None:
                history.append(record.__dict__)
            if epoch % self.config.pretrain.checkpoint_every == 0 or epoch == self.config.pretrain.epochs:
                self._save(epoch, record.validation)
            if self.on_epoch and self.processes.is_main:
                self.on_epoch(record)

    def _epoch(self, epoch: int) -> float:
        totals = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        shares = global_batches(
            len(self.data.train),
            self.config.pretrain.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        total_steps = self.steps * self.config.pretrain.epochs
        self.model.train()
        for number, index in enumerate(shares):
            step = (epoch - 1) * self.steps + number
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.pretrain, self.base_lr, step, total_steps)
            totals += self._step(epoch, index)
            if self.on_step and self.processes.is_main:
                self.on_step(step + 1, total_steps, self.losses[-1])
        return float(totals[0] / totals[1])

    def _step(self, epoch: int, index: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """One global batch; returns its (numerator, denominator), summed over all ranks."""
        empty = len(index) == 0
        with self.phase(phases.INPUT):
            batch = self.data.train.take(np.zeros(1, np.int64) if empty else index)
            base = seeding.key(self.seed, "augment", epoch)
            batch = augmented(batch, index if not empty else np.zeros(1, np.int64), base, self.config, self.augment)
            inputs, targets = self._prepared(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.phase(phases.FORWARD):
            outputs = self.wrapped(*inputs)
        with self.phase(phases.LOSS):
            numerator, denominator = self.loss_function(outputs, targets, self.config)
            if empty:
                numerator, denominator = numerator * 0.0, denominator * 0.0
            sums = torch.stack([numerator.detach(), denominator.detach()]).double()
        with self.phase(phases.COMMUNICATION):
            self.processes.sum(sums)
        with self.phase(phases.BACKWARD):
            (numerator / sums[1].to(numerator.dtype)).backward()
        with self.phase(phases.OPTIMIZER):
            if self.config.optimizer.clip_norm > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
            self.optimizer.step()
        self.losses.append(float(sums[0] / sums[1]))
        if not math.isfinite(self.losses[-1]):
            raise IntegrityError(
                f"the loss is not finite in epoch {epoch}", remedy="lower optimizer.lr or set optimizer.clip_norm"
            )
        return sums

    def _loss(self, model: nn.Module, batch: Examples) -> tuple[Tensor, Tensor]:
        inputs, targets = self._prepared(batch)
        numerator, denominator = self.loss_function(model(*inputs), targets, self.config)
        return numerator, denominator

    def _prepared(self, batch: Examples) -> tuple[list[Tensor], Tensor]:
        """The model's inputs in this training's precision, and the targets, on this process's device."""
        found = tensors(self.application, self.config, batch, str(self.processes.device))
        inputs = [t.to(self.dtype) if t.is_floating_point() else t for t in found]
        return inputs, torch.from_numpy(np.ascontiguousarray(batch.targets)).to(self.processes.device)

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """Loss by global sums over all ranks; the application's metrics on the whole set, on rank 0."""
        if len(examples) == 0:
            return {}
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        with torch.inference_mode():
            for start in range(0, len(examples), 512):
                chunk = np.arange(start, min(start + 512, len(examples)))
                mine = np.array_split(chunk, self.processes.world)[self.processes.rank]
                if len(mine):
                    numerator, denominator = self._loss(self.model, examples.take(mine))
                    sums += torch.stack([numerator, denominator]).double()
        self.processes.sum(sums)
        found = {"loss": float(sums[0] / sums[1])}
        if self.processes.is_main:
            outputs = predict(self.model, self.application, self.config, examples)
            found.update(self.application.metrics(self.config, outputs, examples))
        return {k: v for k, v in found.items() if math.isfinite(v)}

    def _manifest(self, epoch: int, metrics: dict[str, float]) -> CheckpointManifest:
        return CheckpointManifest(
            application=self.application.name,
            config=to_table(self.config),
            stage="pretrain",
            step=epoch,
            seed=self.seed,
            clients_seen=list(self.data.clients),
            metrics=metrics,
            versions={"torch": torch.__version__},
        )

    def _save(self, epoch: int, metrics: dict[str, float]) -> None:
        with self.phase(phases.CHECKPOINT):
            self._write(epoch, metrics)
        self.processes.barrier()

    def _write(self, epoch: int, metrics: dict[str, float]) -> None:
        state = {**optimizer_state.save(self.optimizer), **self.average.save()}  # K-FAC gathers: every rank is needed
        if self.processes.is_main:
            name = f"epoch-{epoch:05d}"
            saved = Checkpoint(
                self._manifest(epoch, metrics), get_arrays(self.model), {STATE_NAME: array_format.to_bytes(state)}
            )
            saved.save(self.out / name)
            atomic.point_to(self.out / checkpoints.LATEST, name)
            for old in sorted(self.out.glob("epoch-*"))[:-2]:
                shutil.rmtree(old)

    def _finish(self) -> Path:
        final = self.average.result(get_arrays(self.model))
        set_arrays(self.model, final, origin="averaged model")
        metrics = self.evaluate(self.data.validation)
        if self.processes.is_main:
            Checkpoint(self._manifest(self.config.pretrain.epochs, metrics), final).save(self.out / "final")
            atomic.point_to(self.out / checkpoints.LATEST, "final")
        self.processes.barrier()
        return self.out / "final"

    def _resume(self) -> int:
        found = sorted(p for p in self.out.glob("epoch-*") if p.is_dir())
        if not found:
            return 0
        last = checkpoints.load(found[-1], with_state=True)
        if replace(last.manifest, config=to_table(self.config), seed=self.seed) != last.manifest:
            raise ConfigError(
                f"{self.out}: holds a run with another configuration or seed",
                remedy="name a new --out folder, or repeat the command that began this run",
            )
        state = array_format.from_bytes(last.state[STATE_NAME], origin=str(found[-1]))
        set_arrays(self.model, last.arrays, origin=str(found[-1]))
        optimizer_state.load(self.optimizer, state)
        self.average.load(state)
        return last.manifest.step


def refuse_local_batch_norm(config: Any, world: int) -> None:
    if world > 1 and config.model.norm == "batch":
        raise ConfigError(
            f"model.norm = 'batch' under {world} processes would normalise each share on its own",
            remedy="set model.norm=group; synchronised batch norm is not part of this release",
        )


def read_training_history(folder: Path) -> list[dict[str, Any]]:
    """One entry an epoch, the last written of each."""
    entries = {e["epoch"]: e for e in read_log(folder / HISTORY_NAME) if isinstance(e.get("epoch"), int)}
    return [entries[k] for k in sorted(entries)]
