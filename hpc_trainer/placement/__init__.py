"""Where a model's parameters and activations lie: one file for each way to spread them over processes."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpc_trainer.layout import Layout
from hpc_trainer.placement.base import Placement


def place(model: nn.Module, config: Any, layout: Layout) -> Placement:
    """By the dimensions of the mesh that have more than one process."""
    return Placement(model, layout)
