"""One global batch: forward and backward passes over this process's micro-batches.

Losses are (numerator, denominator); the denominator is summed over all processes and micro-batches, and gradients are
summed, so that neither the number of processes nor of micro-batches shows. A process whose share is empty takes part
with one sample of weight zero, since collectives wait for every process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fl_core.contracts.sections import PretrainConfig
from fl_core.learning import seeding
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples
from fl_core.learning.local_update import augmented
from fl_core.learning.micro_batch import MicroBatch, micro_batch
from fl_core.learning.normalization import GHOST_BATCH, GhostBatchNorm
from fl_core.learning.torch_arrays import tensors
from fl_core.optimizers.kfac import KFAC
from hpc_trainer import phases
from hpc_trainer.coarse import coarsened
from hpc_trainer.layout import SAMPLES, Layout
from hpc_trainer.placement.base import Placement, forward
from hpc_trainer.recipe import Recipe, global_sum
from hpc_trainer.sampler import largest_share

if TYPE_CHECKING:
    from hpc_trainer.placement.stages import Staged

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, augmented. real: samples that count; where there are none, the one sample fills the shape."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    real: int
    keys: npt.NDArray[np.uint64]


def micro_batches(config: PretrainConfig, sizes: Mapping[str, int], unit: int = 1) -> tuple[int, int]:
    """(samples of a micro-batch, micro-batches of a step) on each process of the mesh."""
    stages = sizes["pipeline"]
    largest = largest_share(config.batch_size, math.prod(sizes[d] for d in SAMPLES), unit)
    # four micro-batches a stage keep a pipeline busy for all but a fifth of the time (Huang et al. 2019)
    size = config.micro_batch or (largest if stages == 1 else -(-largest // (4 * stages)))
    return size, max(-(-largest // size), stages)


class Batches:
    """From this process's share of a global batch to its micro-batches on the device; as many on every process."""

    def __init__(self, application: Application, config: Any, data: Examples, layout: Layout, seed: int) -> None:
        self.application, self.config, self.data, self.seed = application, config, data, seed
        self.augment = application.augment_function()
        self.unit = GHOST_BATCH if config.model.norm == "ghost" else 1
        self.size, self.count = micro_batches(config.pretrain, layout.sizes, self.unit)
        in_memory = all(isinstance(a, np.ndarray) for a in (*data.inputs.values(), data.targets))
        self.ahead = 0 if in_memory else config.pretrain.prefetch

    def example(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Inputs of one whole micro-batch."""
        chosen = self.data.take(np.arange(self.size) % len(self.data))
        return on_device(self.application, self.config, chosen, device, dtype)[0]

    def __call__(
        self, epoch: int, index: Index, device: torch.device, dtype: torch.dtype, factor: int = 1
    ) -> list[Batch]:
        """factor: by which edges are shortened."""
        parts = [index[i * self.size : (i + 1) * self.size] for i in range(self.count)]
        return [self._batch(epoch, part, device, dtype, factor) for part in parts]

    def _batch(self, epoch: int, part: Index, device: torch.device, dtype: torch.dtype, factor: int) -> Batch:
        chosen = part if len(part) else np.zeros(1, np.int64)
        base = seeding.key(self.seed, "augment", epoch)
        batch = augmented(self.data.take(chosen), chosen, base, self.config, self.augment)
        keys = seeding.example_keys(seeding.key(self.seed, "dropout", epoch), chosen)
        inputs, targets = coarsened(*on_device(self.application, self.config, batch, device, dtype), factor)
        return Batch(inputs=inputs, targets=targets, real=len(part), keys=keys)


def on_device(
    application: Application, config: Any, batch: Examples, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(the model's inputs, targets); floating-point inputs in ``dtype``."""
    inputs = tensors(application, config, batch, str(device))
    targets = torch.from_numpy(np.ascontiguousarray(batch.targets)).to(device)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs), targets


class Step:
    """Forward pass, loss and backward pass, each announced to ``phase``."""

    def __init__(
        self,
        application: Application,
        config: Any,
        placement: Placement,
        recipe: Recipe,
        phase: phases.Phases = phases.unobserved,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.config, self.placement, self.recipe = config, placement, recipe
        self.loss_function, self.sample = application.loss_function(), application.sample_function()
        self.kfac = optimizer if isinstance(optimizer, KFAC) else None
        self.phase = phase
        self.own = torch.zeros(())  # this process's part of the last batch's numerator
        self.ghosts = [m for m in placement.model.modules() if isinstance(m, GhostBatchNorm)]
        for ghost in self.ghosts:
            ghost.deferred = True

    def __call__(self, batches: list[Batch], *, stop: bool = False, writing: bool = False) -> Tensor:
        """Gradients of the global loss are in place; returns sums over all processes: numerator, denominator, and how many
        want to ``stop`` and are still ``writing`` a checkpoint."""
        sums = torch.zeros(4, dtype=torch.float64, device=batches[0].targets.device)
        sums[2], sums[3] = float(stop), float(writing)
        if self.placement.layout.pipeline is not None:
            self._in_stages(cast("Staged", self.placement), batches, sums)
            return sums
        for number, batch in enumerate(batches):
            with self.placement.accumulating(last=number == len(batches) - 1), micro_batch(facts(batch)):
                numerator, denominator = self.loss(self.placement.module, batch)
                sums[:2] += torch.stack([numerator.detach(), denominator.detach()])
                self.own = sums[0].clone()
                if len(batches) == 1:  # divided before the backward pass: one pass over the gradients less
                    self._total(sums)
                    numerator = numerator / sums[1].to(numerator.dtype)
                with self.phase(phases.BACKWARD):
                    numerator.backward()
        if len(batches) > 1:
            self._total(sums)
            self.placement.scale_gradients(1 / sums[1])
        if self.kfac is not None and (len(batches) > 1 or self.kfac.samples):
            self.kfac.scaled(float(1 / sums[1]))
        self._settle_ghosts()
        return sums

    def _in_stages(self, placement: Staged, batches: list[Batch], sums: Tensor) -> None:
        """The last stage has the losses."""

        def differentiated(outputs: Any, number: int) -> Tensor:
            batch = batches[number]
            seen = slice(max(1, batch.real))
            shown = tuple(o[seen] for o in outputs) if isinstance(outputs, tuple) else outputs[seen]
            numerator, denominator = self.loss_function(shown, batch.targets, self.config)
            weight = float(batch.real > 0)
            sums[:2] += weight * torch.stack([numerator.detach(), denominator.detach()])
            weighted: Tensor = numerator * weight
            return weighted

        with self.phase(phases.BACKWARD):
            placement.run([batch.inputs for batch in batches], differentiated)
        self.own = sums[0].clone()
        self._total(sums)
        placement.scale_gradients(1 / sums[1])

    def _total(self, sums: Tensor) -> None:
        with self.phase(phases.COMMUNICATION):
            layout = self.placement.layout
            self.recipe.total(sums, layout.summed)
            if layout.pipeline is not None:
                dist.all_reduce(sums, group=layout.pipeline)
            if layout.tensor is not None:  # the same losses; but one process may have been told to stop, or still write
                dist.all_reduce(sums[2:], group=layout.tensor)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(numerator, denominator) of one micro-batch; zeros for one without samples."""
        with self.phase(phases.FORWARD):
            outputs = forward(module, batch.inputs, self.config)
        with self.phase(phases.LOSS):
            numerator, denominator = self.loss_function(outputs, batch.targets, self.config)
        if self.kfac is not None and self.kfac.samples:
            self._sample_curvature(self.kfac, outputs, batch)
        if batch.real == 0:
            return numerator * 0.0, denominator * 0.0
        copies = self.placement.layout.copies
        return (numerator, denominator) if copies == 1 else (numerator / copies, denominator / copies)

    def _sample_curvature(self, kfac: KFAC, outputs: Any, batch: Batch) -> None:
        assert self.sample is not None
        drawn = tuple(o.detach() for o in outputs) if isinstance(outputs, tuple) else outputs.detach()
        keys = seeding.example_keys(seeding.key("curvature"), batch.keys.astype(np.int64))
        numerator, _ = self.loss_function(outputs, self.sample(drawn, keys, self.config), self.config)
        with self.phase(phases.BACKWARD):
            kfac.sample(numerator if batch.real else numerator * 0.0)

    def _settle_ghosts(self) -> None:
        """Running statistics of ghost batch norm: one sum over processes for all layers."""
        if not self.ghosts:
            return
        parts = [
            torch.zeros(2 * g.num_features + 1, dtype=torch.float64, device=g.weight.device)  # a weight may be sharded
            if g.pending is None
            else g.pending
            for g in self.ghosts
        ]
        found = global_sum(torch.cat(parts), self.placement.layout.summed)
        for ghost, part in zip(self.ghosts, found.split([len(p) for p in parts]), strict=True):
            ghost.pending = part
            ghost.settle()


def facts(batch: Batch) -> MicroBatch:
    return MicroBatch(real=None if batch.real else 0, keys=batch.keys)
