"""The same training by Lightning's Trainer, for ``benchmarks/ddp_overhead.py``; needs the ``bench`` extra."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ddp_overhead import Task, loader, mean_over_processes, model_of
from fl_core.learning.application import Application
from fl_core.optimizers import build_optimizer
from hpc_trainer.processes import Processes


class Module(pl.LightningModule):
    def __init__(self, app: Application, config: Any, processes: Processes, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model_of(app, config, processes, dtype)
        self.config, self.processes = config, processes
        self.loss_function = app.loss_function()
        self.losses: list[float] = []
        self.ends: list[float] = []

    def training_step(self, batch: tuple[tuple[Tensor, ...], Tensor], number: int) -> Tensor:
        inputs, targets = batch
        numerator, denominator = self.loss_function(self.model(*inputs), targets, self.config)
        loss: Tensor = numerator / denominator
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
        self.losses.append(mean_over_processes(outputs["loss"], self.processes))
        self.ends.append(time.perf_counter())

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.model, self.config.optimizer)


def fitted(module: Module, config: Any, data: Any, app: Application, processes: Processes, steps: int) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    dtype = next(module.model.parameters()).dtype
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes.world, strategy="ddp" if processes.world > 1 else "auto", max_steps=steps,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        gradient_clip_val=config.optimizer.clip_norm or None, precision="64-true" if dtype == torch.float64 else "32-true",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(Task(app, config, data.train, dtype), config, processes))


def lightning_take(
    app: Application, config: Any, data: Any, processes: Processes, dtype: torch.dtype
) -> Callable[[int], list[float]]:
    """Each call is a fit of its own; the first batch of it, with its set-up, is not counted."""
    module = Module(app, config, processes, dtype)

    def take(count: int) -> list[float]:
        module.ends.clear()
        dist.barrier()
        fitted(module, config, data, app, processes, count + 1)
        return [b - a for a, b in zip(module.ends, module.ends[1:], strict=False)]

    return take


def lightning_losses(
    app: Application, config: Any, data: Any, processes: Processes, dtype: torch.dtype, count: int
) -> list[float]:
    module = Module(app, config, processes, dtype)
    fitted(module, config, data, app, processes, count)
    return module.losses
