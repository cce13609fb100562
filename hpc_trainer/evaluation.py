"""Evaluation by global sums: each process its share, the loss from summed numerators and denominators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from fl_core.learning.application import Application
from fl_core.learning.examples import Examples
from hpc_trainer import spatial
from hpc_trainer.layout import Layout
from hpc_trainer.processes import Processes
from hpc_trainer.step import Batch, Step, on_device


class Evaluation:
    """Loss on all processes, the application's metrics on the main one, both of the whole set."""

    def __init__(self, application: Application, config: Any, step: Step, processes: Processes, layout: Layout) -> None:
        self.application, self.config, self.step = application, config, step
        self.processes, self.layout = processes, layout

    def __call__(self, examples: Examples, dtype: torch.dtype) -> dict[str, float]:
        if len(examples) == 0:
            return {}
        self.step.placement.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        outputs: list[tuple[npt.NDArray[Any], ...]] = []
        with torch.no_grad():
            size = self.config.pretrain.batch_size  # what fits in training fits here
            for start in range(0, len(examples), size):
                chunk = np.arange(start, min(start + size, len(examples)))
                mine = np.array_split(chunk, self.layout.shares)[self.layout.share]
                batch = self._batch(examples, mine, dtype)
                found = self.step.placement.outputs(batch.inputs, self.config)
                found = found if isinstance(found, tuple) else (found,)
                if len(mine):
                    loss = self.step.loss_function(found if len(found) > 1 else found[0], batch.targets, self.config)
                    sums += torch.stack(loss).double() / self.layout.copies
                count = len(mine) if self.layout.first_of_copies else 0
                parts = self._gathered(tuple(spatial.whole(f)[:count].cpu().numpy() for f in found))
                outputs += [tuple(map(np.concatenate, zip(*parts, strict=True)))] if parts else []
        if self.layout.summed is not None:
            dist.all_reduce(sums, group=self.layout.summed)
        scores = {"loss": float(sums[0] / sums[1])}
        if self.processes.is_main:
            names = [spec.name for spec in self.application.outputs(self.config)]
            whole = dict(zip(names, map(np.concatenate, zip(*outputs, strict=True)), strict=True))
            scores.update(self.application.metrics(self.config, whole, examples))
        return {k: v for k, v in scores.items() if math.isfinite(v)}

    def _batch(self, examples: Examples, mine: npt.NDArray[np.int64], dtype: torch.dtype) -> Batch:
        chosen = mine if len(mine) else np.zeros(1, np.int64)
        inputs, targets = on_device(self.application, self.config, examples.take(chosen), self.processes.device, dtype)
        return Batch(inputs=inputs, targets=targets, real=len(mine), keys=np.zeros(len(chosen), np.uint64))

    def _gathered(self, mine: tuple[npt.NDArray[Any], ...]) -> list[tuple[npt.NDArray[Any], ...]]:
        """All shares, in the order of the samples, on the main process."""
        group = self.layout.summed
        if group is None:
            return [mine] if self.processes.is_main else []
        root = dist.get_global_rank(group, 0)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.gather_object(mine, parts if dist.get_rank() == root else None, dst=root, group=group)
        return parts if self.processes.is_main else []
