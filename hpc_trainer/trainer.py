"""Training whose loss does not depend on how many processes ran it, nor on how the model lies on them.

One global batch size; this process's share of each global batch; losses as (numerator, denominator) with the denominator
summed over all processes; gradients SUMMED, not averaged; evaluation by global sums; augmentation and dropout keyed by
(seed, epoch, example). ``recipe.py`` holds the decisions, ``step.py`` one step, ``placement/`` where the model lies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.errors import IntegrityError, Interrupted
from fl_core.learning.application import Application
from fl_core.learning.averaging import ModelAverage
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import set_arrays
from fl_core.optimizers import build_optimizer
from fl_core.storage.log import AppendLog, read_log
from hpc_trainer import phases, snapshot
from hpc_trainer.coarse import factor_at, refuse_what_is_too_coarse
from hpc_trainer.dropout import key_dropout
from hpc_trainer.evaluation import Evaluation
from hpc_trainer.layout import arrange
from hpc_trainer.placement import place
from hpc_trainer.prefetch import ahead
from hpc_trainer.processes import Processes
from hpc_trainer.recipe import RIGHT, Recipe
from hpc_trainer.refusals import refuse_what_breaks_integrity, refuse_what_draws_no_targets
from hpc_trainer.run_folder import Progress, RunFolder
from hpc_trainer.sampler import steps_per_epoch
from hpc_trainer.schedules import learning_rate
from hpc_trainer.step import Batch, Batches, Index, Step

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
    """Trains one application; ``run()`` returns the folder of the final checkpoint (written by the main process).

    on_epoch, on_step: called on the main process. on_gradients(step, trainer): on every process, after the gradients of
    a step were summed and before they are used. phase: announced as in ``phases``. stop_asked: whether this process wants
    a checkpoint and then the end. start: whose weights training begins with, in a run that is not taken up.
    """

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
        recipe: Recipe = RIGHT,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
        on_gradients: Callable[[int, Trainer], None] | None = None,
        phase: phases.Phases = phases.unobserved,
        stop_asked: Callable[[], bool] = lambda: False,
        start: Checkpoint | None = None,
    ) -> None:
        self.application, self.config, self.data = application, config, data
        self.processes, self.seed, self.dtype = processes, seed, dtype
        self.recipe, self.phase, self.stop_asked = recipe, phase, stop_asked
        self.on_epoch, self.on_step, self.on_gradients = on_epoch, on_step, on_gradients
        self.layout = arrange(config.pretrain, processes.rank, processes.world, processes.device.type)
        self.batches = Batches(application, config, data.train, self.layout, seed)
        refuse_what_draws_no_targets(application, config)
        self.model: nn.Module = application.build_model(config)
        if start is not None:
            set_arrays(self.model, start.arrays, origin="the checkpoint to start from")
        self.model.to(device=processes.device, dtype=dtype)
        refuse_what_breaks_integrity(self.model, config, self.layout, self.batches.count, dtype)
        refuse_what_is_too_coarse(self.model, self.batches.example(processes.device, dtype), config)
        recipe.synchronise(key_dropout(self.model), self.layout.summed)
        self.placement = place(
            self.model, config, self.layout, lambda: self.batches.example(processes.device, dtype), self.batches.count
        )
        self.optimizer = build_optimizer(self.placement.model, config.optimizer, self.layout.summed)
        self.base_lr = config.pretrain.lr or config.optimizer.lr
        self.average = ModelAverage(config.pretrain.average_last, config.pretrain.epochs)
        self.one_step = Step(application, config, self.placement, recipe, phase, self.optimizer)
        self.evaluation = Evaluation(application, config, self.one_step, processes, self.layout)
        self.steps = steps_per_epoch(len(data.train), config.pretrain.batch_size)
        self.losses: list[float] = []  # the global loss of every step
        self.folder = RunFolder(out, application, config, data.clients, seed, processes, start)
        self.progress = self._resume()

    def run(self) -> Path:
        history = AppendLog(self.folder.path / HISTORY_NAME) if self.processes.is_main else None
        try:
            for epoch in range(self.progress.epoch + 1, self.config.pretrain.epochs + 1):
                record = self._epoch(epoch)
                if history is not None:
                    history.append(record.__dict__)
                if self.on_epoch and self.processes.is_main:
                    self.on_epoch(record)
            return self._finish()
        finally:
            self.folder.rest()
            if history is not None:
                history.close()

    def _epoch(self, epoch: int) -> EpochRecord:
        began, first = time.monotonic(), self.progress.step
        loss = self._train(epoch)
        seconds = time.monotonic() - began
        validation = self.evaluate(self.data.validation)
        if epoch >= self.average.first:
            self.average.add(epoch, snapshot.local_arrays(self.placement))
        self.progress = Progress(epoch=epoch)
        if epoch % self.config.pretrain.checkpoint_every == 0 or epoch == self.config.pretrain.epochs:
            self._save(validation)
        trained = len(self.data.train) * (1 - first / self.steps)
        return EpochRecord(
            epoch=epoch, loss=loss, validation=validation, seconds=seconds, examples_per_second=trained / seconds
        )

    def _train(self, epoch: int) -> float:
        """The rest of the epoch from ``progress`` on; returns its mean loss over all examples."""
        shares = self.recipe.shares(
            len(self.data.train),
            self.config.pretrain.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=self.layout.share,
            world=self.layout.shares,
            unit=self.batches.unit,
            start=self.progress.step,
        )
        total = self.steps * self.config.pretrain.epochs

        def made(item: tuple[int, Index]) -> list[Batch]:
            factor = factor_at(self.config.pretrain.coarse, item[0], total)
            return self.batches(epoch, item[1], self.processes.device, self.dtype, factor)

        numbered = enumerate(shares, start=(epoch - 1) * self.steps + self.progress.step)
        for (step, index), batches in ahead(numbered, made, self.batches.ahead):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.pretrain, self.base_lr, step, total)
            sums = self._step(epoch, step, index, batches)
            if sums[3] == 0:
                self.folder.written()
            self.progress = self.progress.after_step(sums)
            if self.on_step and self.processes.is_main:
                self.on_step(step + 1, total, self.losses[-1])
            self._keep(float(sums[2]) > 0)
        return self.progress.numerator / self.progress.denominator

    def _keep(self, stopping: bool) -> None:
        """A checkpoint in mid-epoch: every ``checkpoint_steps``, and before an end that was asked for."""
        every = self.config.pretrain.checkpoint_steps
        if stopping:
            self.checkpoint()
            raise Interrupted(
                f"told to stop after step {self.progress.step} of epoch {self.progress.epoch + 1}; a checkpoint is written",
                remedy="repeat the command: it goes on where it stopped",
            )
        if every and self.progress.step % every == 0 and self.progress.step < self.steps:
            self._save({})

    def _step(self, epoch: int, step: int, index: Index, made: Callable[[], list[Batch]]) -> Tensor:
        """One global batch; returns its (numerator, denominator, stop, writing), summed over all processes."""
        with self.phase(phases.INPUT):
            batches = made()
        self.placement.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.one_step(batches, stop=self.stop_asked(), writing=self.folder.writing).cpu()
        self.losses.append(float(sums[0] / sums[1]))
        if not math.isfinite(self.losses[-1]):
            raise self._not_finite(epoch, step, index)
        if self.on_gradients:
            self.on_gradients(step, self)
        with self.phase(phases.OPTIMIZER):
            if self.config.optimizer.clip_norm > 0:
                self.placement.clip(self.config.optimizer.clip_norm)
            self.optimizer.step()
        return sums

    def _not_finite(self, epoch: int, step: int, index: Index) -> IntegrityError:
        """Names the processes whose share of the loss is not finite, and its examples; collective."""
        finite = math.isfinite(float(self.one_step.own))
        mine = [] if finite else [str(name) for name in self.data.train.columns["example_id"][index]]
        parts = self.processes.gather(mine)
        named = [f"rank {rank}: {_some(ids)}" for rank, ids in enumerate(parts) if ids]
        return IntegrityError(
            f"the loss is not finite in epoch {epoch}, step {step + 1}; {'; '.join(named) or 'no single share'}",
            remedy="look at these examples, lower optimizer.lr or set optimizer.clip_norm",
        )

    def evaluate(self, examples: Examples) -> dict[str, float]:
        return self.evaluation(examples, self.dtype)

    def checkpoint(self) -> None:
        """Of now, on the disk when this returns; to be called by every process, between steps."""
        self._save({})
        self.folder.settle()
        self.processes.barrier()

    def _save(self, metrics: dict[str, float]) -> None:
        with self.phase(phases.CHECKPOINT):
            self.folder.save(self.progress, snapshot.of_training(self.placement, self.optimizer, self.average), metrics)

    def _finish(self) -> Path:
        final = self.average.result(snapshot.local_arrays(self.placement))
        snapshot.set_local_arrays(self.placement, final)
        metrics = self.evaluate(self.data.validation)
        return self.folder.finish(self.config.pretrain.epochs, snapshot.of_model(self.placement).pieces, metrics)

    def _resume(self) -> Progress:
        found = self.folder.newest()
        if found is None:
            return Progress(epoch=0)
        with found.shards as shards:
            snapshot.restore(shards, self.placement, self.optimizer, self.average)
        return found.progress


def _some(ids: list[str], shown: int = 20) -> str:
    return ", ".join(ids[:shown]) + (f" and {len(ids) - shown} more" if len(ids) > shown else "")


def read_training_history(folder: Path) -> list[dict[str, Any]]:
    """One entry an epoch, the last written of each."""
    entries = {e["epoch"]: e for e in read_log(folder / HISTORY_NAME) if isinstance(e.get("epoch"), int)}
    return [entries[k] for k in sorted(entries)]
