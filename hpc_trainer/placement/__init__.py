"""Where a model's parameters and activations lie: one file for each way to spread them over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hpc_trainer.batch_norm import leave_out_of_compilation
from hpc_trainer.layout import Layout
from hpc_trainer.placement.base import Placement
from hpc_trainer.placement.blocks import recompute_activations
from hpc_trainer.spatial import split_space


def place(
    model: nn.Module, config: Any, layout: Layout, example: Callable[[], tuple[Tensor, ...]], count: int
) -> Placement:
    """By the dimensions of the mesh that have more than one process; ``count`` micro-batches like ``example``.

    The ways that torch's compiler or tensor subclasses are needed for are imported where they are taken: every other process
    starts seconds sooner.
    """
    if config.pretrain.activation_checkpointing:
        recompute_activations(model)
    if config.pretrain.compile:
        leave_out_of_compilation(model)
        model.compile()
    if layout.spatial is not None:
        axis = config.pretrain.spatial_axis
        split_space(model, layout.spatial, axis=axis, batch=layout.summed, samples=layout.samples)
    if layout.tensor is not None:
        from hpc_trainer.placement.channels import Channelled

        return Channelled(model, layout)
    if layout.pipeline is not None:
        from hpc_trainer.placement.stages import Staged

        return Staged(model, layout, example(), count, config.pretrain.schedule_of_stages)
    if layout.sharded:
        from hpc_trainer.placement.sharded import Sharded

        return Sharded(model, layout)
    return Placement(model, layout)
