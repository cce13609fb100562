"""The blocks of any model: what is cut and gathered as one, and what is recomputed as one."""

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


def segments(model: nn.Module) -> Iterator[nn.Module]:
    """What is recomputed as one: blocks, and sequences of nothing but layers (convolution, norm, activation, ...)."""
    for child in model.children():
        parts = list(child.children())
        layers_only = isinstance(child, nn.Sequential) and not any(True for p in parts for _ in p.children())
        if isinstance(child, CONTAINERS) and not layers_only:
            yield from segments(child)
        elif len(parts) > 1 and any(True for _ in child.parameters()):
            yield child  # a single layer has nothing between its input and its output to save


def recompute_activations(model: nn.Module) -> None:
    """Each segment keeps its input only and repeats its forward pass in the backward pass (Chen et al. 2016).

    The repetition moves no running statistics, and dropout, keyed by sample, draws the same masks.
    """
    for segment in segments(model):
        segment.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, segment.forward, use_reentrant=False, context_fn=_contexts
        )


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return recomputed(), Again()


class Again(AbstractContextManager[None]):
    """The repetitions of one forward pass: one for each backward pass through it, of which there may be several."""

    def __init__(self) -> None:
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(recomputed())
            stack.enter_context(recomputation())
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()
