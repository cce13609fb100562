"""What a training run needs of each process, before anybody books nodes: memory, operations, messages, time.

Nothing is allocated: the step runs on tensors without memory. Activations, gradients and temporaries are those of its
highest point; the optimiser's state is counted by rule, and held against the real one by a test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.learning.application import Application
from fl_core.optimizers._kfac_blocks import blocks_of
from fl_core.optimizers.kfac import Cut
from hpc_trainer.performance import tracking

PARALLEL = ("ddp", "fsdp")
# Code of torch and oneDNN that the first training step of a process makes resident, whatever the model (measured, x86).
LIBRARIES = 88_000_000
ADAM = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}  # copies of the parameters


def estimate(
    app: Application,
    preset: str,
    overrides: Sequence[str],
    *,
    world: int,
    parallel: str,
    probe: dict[str, Any] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    if world < 1:
        raise InputError(f"--world {world}: at least one process is needed")
    config = app.configure(overrides, preset=preset)
    batch = -(-config.pretrain.batch_size // world)
    targets = _targets(app, preset, overrides)
    loss = app.loss_function()
    with tracking.unallocated():
        model = app.build_model(config)
        inputs = [torch.zeros((batch, *s.shape[1:]), dtype=getattr(torch, s.dtype)) for s in app.inputs(config)]
        expected = torch.zeros((batch, *targets.shape[1:]), dtype=targets.dtype)
        tracked = tracking.track(model, inputs, expected, lambda o, t: loss(o, t, config), device)
        count = tracking.elements(model)
        whole = 4 * count
        state = state_bytes(model, config.optimizer)
        largest = max((4 * tracking.elements(child) for child in model.children()), default=0)
    memory = _memory(tracked, whole, state, largest, world, parallel, device)
    messages = _messages(whole, world, parallel)
    document: dict[str, Any] = {
        "application": app.name,
        "world": world,
        "parallel": parallel,
        "batch": {"global": config.pretrain.batch_size, "process": batch},
        "parameters": count,
        "memory_bytes": memory,
        "flops": {"forward": tracked.forward_flops, "backward": tracked.backward_flops},
        "message_bytes": messages,
    }
    if probe:
        document["step_seconds_at_least"] = _seconds(document, probe)
    return document


def _targets(app: Application, preset: str, overrides: Sequence[str]) -> torch.Tensor:
    """Of a few generated examples: their shape and type."""
    few = []
    for f in dataclasses.fields(app.configure(overrides, preset=preset).data):
        if f.type in ("int", int) and (f.name == "clients" or f.name.endswith("_per_client")):
            few.append(f"data.{f.name}={max(2, int(f.metadata.get('low', 2)))}")
    config = app.configure([*overrides, *few], preset=preset)
    return torch.from_numpy(app.generate(config, 0).examples(config).targets[:1].copy())


def _memory(
    tracked: tracking.Tracked, whole: int, state: int, largest: int, world: int, parallel: str, device: str
) -> dict[str, int]:
    """Bytes of a process by kind, at the higher of two points: in the backward pass, and in the optimiser's step."""
    share = world if parallel == "fsdp" else 1
    high = {k: int(v) for k, v in tracked.peak.items()}
    passes = {
        "parameters": high.get("parameters", 0) // share,
        "gradients": high.get("gradients", 0) // share,
        "optimizer": state // share,
        "activations": high.get("activations", 0),
        "temporaries": high.get("temporaries", 0),
        "inputs": high.get("inputs", 0),
    }
    step = {
        "parameters": high.get("parameters", 0) // share,
        "gradients": whole // share,
        "optimizer": state // share,
        "inputs": high.get("inputs", 0),
    }
    if parallel == "fsdp" and world > 1:
        passes["gathered"] = 2 * largest  # one unit's parameters and gradients, whole
    elif world > 1:  # DDP's buckets hold the gradients once more
        passes["buckets"] = step["buckets"] = whole
    found = max(passes, step, key=lambda point: sum(point.values()))
    found["libraries"] = LIBRARIES if device == "cpu" else 0
    return {**found, "total": sum(found.values())}


def state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """What the optimiser holds between two steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = sum(p.numel() for p in parameters)
    if config.name == "sgd":
        return 4 * whole if config.momentum else 0
    if config.name == "lars":
        return 4 * whole if config.momentum else 0
    if config.name in ADAM:
        return 4 * ADAM[config.name] * whole
    if config.name == "soap":
        squares = sum(2 * d * d for p in parameters if p.ndim > 1 for d in p.shape if d <= config.max_factor)
        return 4 * (2 * whole + squares)
    if config.name == "kfac":
        factors = 0
        for module in model.modules():
            for block in blocks_of(module):
                for cut in (Cut.of(block.d, config.max_factor), Cut.of(block.o, config.max_factor)):
                    factors += block.parts * cut.count * (2 * cut.size**2 + cut.size)
        return 4 * (factors + (whole if config.momentum else 0))
    raise InputError(
        f"optimizer.name = {config.name!r}: its memory is not known to estimate",
        remedy=f"known: {', '.join(sorted([*ADAM, 'soap', 'kfac']))}",
    )


def _messages(whole: int, world: int, parallel: str) -> int:
    """Bytes that a process sends in a step: a ring's all-reduce, or FSDP's two gathers and one scatter."""
    rounds = {"ddp": 2, "fsdp": 3}[parallel]
    return int(rounds * (world - 1) / world * whole)


def _seconds(document: dict[str, Any], probe: dict[str, Any]) -> float | None:
    """Operations at the measured matrix-product peak, then the messages: nothing is hidden, nothing is slower."""
    peak = probe["matrix_product"]["float32"]["value"]
    seconds = sum(document["flops"].values()) / peak
    reduce = probe.get("all_reduce", {})
    if document["world"] > 1:
        if "alpha_seconds" not in reduce:
            return None
        share = 2 * (reduce["processes"] - 1) / reduce["processes"]
        steps = 2 * math.ceil(math.log2(document["world"]))
        seconds += steps * reduce["alpha_seconds"]["value"]
        seconds += document["message_bytes"] * reduce["beta_seconds_per_byte"]["value"] / share
    return float(seconds)
