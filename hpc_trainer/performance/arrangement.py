"""What an arrangement of processes makes of one process's memory and messages, counted on tensors without memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hpc_trainer.layout import SAMPLES
from hpc_trainer.placement.channels import Plan
from hpc_trainer.placement.stages import cut_points, layer_costs, parameters_of_stages

ELEMENT = 4  # bytes; parameters are float32


@dataclass(frozen=True, kw_only=True)
class Held:
    """Of the process that holds most.

    parameters: elements of its layers, before sharding; shards: processes over which those are cut. halo: bytes of
    fetched rows that are kept; fetched: of the largest layer's input together with them. sent: bytes of activations and their gradients.
    in_flight: micro-batches' activations held at once, as a share of one whole micro-batch's.
    """

    parameters: int
    shards: int
    halo: int = 0
    fetched: int = 0
    sent: int = 0
    in_flight: float = 1.0


def part_of(shape: tuple[int, ...], axis: int, parts: int) -> tuple[int, ...]:
    """The largest share of a tensor cut along ``axis``; tensors without that axis stay whole."""
    if parts == 1 or len(shape) <= axis:
        return shape
    return (*shape[:axis], -(-shape[axis] // parts), *shape[axis + 1 :])


def held(
    model: nn.Module,
    inputs: list[Tensor],
    sizes: Mapping[str, int],
    *,
    parallel: str,
    axis: int,
    schedule: str,
    count: int,
) -> Held:
    """``inputs``: one process's micro-batch of ``count``."""
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shards = sizes["shard"] * (sizes["spatial"] if parallel != "ddp" else 1)
    if sizes["tensor"] > 1:
        size = sizes["tensor"]
        plan = Plan.of(model, size)
        cut = sum(p.numel() for p in plan.cut_parameters())
        kept = whole - cut + -(-cut // size)
        sent = _gathered(
            model, inputs, {*plan.columns, *(m for first, _, last in plan.pairs for m in (first, last))}, size
        )
        return Held(parameters=kept, shards=1, sent=count * sent)
    if sizes["pipeline"] > 1:
        stages = sizes["pipeline"]
        costs = layer_costs(model, tuple(inputs))
        kept = max(parameters_of_stages(model, costs, cut_points(costs, stages)))
        in_flight = (min(stages, count) if schedule == "1f1b" else count) / stages
        return Held(parameters=kept, shards=1, in_flight=in_flight)
    if sizes["spatial"] > 1:
        halo, fetched = _halo(model, inputs, axis)
        return Held(parameters=whole, shards=shards, halo=halo, fetched=fetched, sent=2 * count * halo)
    return Held(parameters=whole, shards=shards)


def _gathered(model: nn.Module, inputs: list[Tensor], layers: set[nn.Module], size: int) -> int:
    """Outputs forward, gradients of inputs backward; a ring sends each whole once (gather) or twice (sum)."""
    total = 0

    def note(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal total
        total += ELEMENT * (output.numel() + 2 * given[0].numel()) * (size - 1) // size

    _walk(model, inputs, layers, note)
    return total


def _halo(model: nn.Module, inputs: list[Tensor], axis: int) -> tuple[int, int]:
    """(bytes of all layers' rows from neighbours, largest input with its rows)."""
    total = largest = 0

    def note(module: Any, given: Any, output: Tensor) -> None:
        nonlocal total, largest
        x = given[0]
        window = axis - (x.dim() - len(module.kernel_size))
        if not 0 <= window < len(module.kernel_size):
            window = 0
        rows = module.dilation[window] * (module.kernel_size[window] - 1) + 1 - module.stride[window]
        extent = x.shape[x.dim() - len(module.kernel_size) + window]
        if rows > 0 and not module.transposed:
            total += ELEMENT * x.numel() // extent * rows
            largest = max(largest, ELEMENT * x.numel() // extent * (extent + rows))

    _walk(model, inputs, {m for m in model.modules() if isinstance(m, _ConvNd)}, note)
    return total, largest


def _walk(model: nn.Module, inputs: list[Tensor], layers: set[nn.Module], note: Any) -> None:
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()


def adding(sizes: Mapping[str, int]) -> int:
    """Processes whose gradients of the same parameters add up."""
    return math.prod(sizes[d] for d in (*SAMPLES, "spatial"))
