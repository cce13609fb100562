"""The blocks of any model: what is cut, gathered or recomputed as one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import nn
from torch.utils.checkpoint import checkpoint

from fl_core.learning.micro_batch import recomputation
from hpc_trainer.spatial.windows import recomputed

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The model's outermost modules with parameters; containers are opened, so that their entries are blocks."""
    for child in model.children():
        if isinstance(child, CONTAINERS):
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def recompute_activations(model: nn.Module) -> None:
    """Each block keeps its input only and repeats its forward pass in the backward pass (Chen et al. 2016).

    The repetition moves no running statistics, and dropout, keyed by sample, draws the same masks.
    """
    for block in blocks(model):
        if any(True for _ in block.children()):  # a single layer has nothing between its input and its output to save
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, context_fn=_contexts
            )


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return recomputed(), _again()


@contextlib.contextmanager
def _again() -> Iterator[None]:
    with recomputed(), recomputation():
        yield
