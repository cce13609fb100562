"""What a training run needs of each process, before anybody books nodes: memory, operations, messages, time.

Nothing is allocated: the step runs on tensors without memory. Activations, gradients and temporaries are those of its
highest point; the optimiser's state is counted by rule, and held against the real one by a test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.learning.application import Application
from fl_core.optimizers._kfac_blocks import blocks_of
from fl_core.optimizers.kfac import Cut
from hpc_trainer.batch_norm import synchronise_batch_norm
from hpc_trainer.layout import mesh_sizes
from hpc_trainer.performance import tracking
from hpc_trainer.performance.arrangement import Held, adding, held, part_of
from hpc_trainer.placement.blocks import blocks, recompute_activations
from hpc_trainer.placement.sharded import SMALLEST
from hpc_trainer.refusals import refuse_arrangement
from hpc_trainer.step import micro_batches

# Code of torch and oneDNN that the first training step of a process makes resident, whatever the model, beyond what the trainer's
# imports have (measured, x86).
LIBRARIES = 38_000_000
ADAM = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}  # copies of the parameters


def estimate(
    app: Application,
    preset: str,
    overrides: Sequence[str],
    *,
    world: int,
    parallel: str,
    mesh: str = "",
    probe: dict[str, Any] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    if world < 1:
        raise InputError(f"--world {world}: at least one process is needed")
    overrides = [*overrides, f"pretrain.parallel={parallel}", *([f"pretrain.mesh={mesh}"] if mesh else [])]
    config = app.configure(overrides, preset=preset)
    pretrain, sizes = config.pretrain, mesh_sizes(config.pretrain, world)
    refuse_arrangement(config, sizes)
    batch, count = micro_batches(pretrain, sizes)
    targets = target_of(app, preset, overrides)
    loss = app.loss_function()
    axis, parts = pretrain.spatial_axis, sizes["spatial"]
    with tracking.unallocated():
        model = app.build_model(config)
        shapes = [(part_of((batch, *s.shape[1:]), axis, parts), getattr(torch, s.dtype)) for s in app.inputs(config)]
        inputs = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
        behind = axis - (len(shapes[0][0]) - 1 == targets.dim())  # labels of each place have no channels
        expected = torch.zeros(part_of((batch, *targets.shape[1:]), behind, parts), dtype=targets.dtype)
        kept = held(
            model, inputs, sizes, parallel=parallel, axis=axis, schedule=pretrain.schedule_of_stages, count=count
        )
        whole_count = tracking.elements(model)
        state = state_bytes(model, config.optimizer)
        units = [4 * tracking.elements(unit) for unit in blocks(model)]
        largest = max((size for size in units if size >= 4 * SMALLEST), default=4 * whole_count)
        synchronise_batch_norm(model, None)  # what trains, in one process too
        if pretrain.activation_checkpointing:
            recompute_activations(model)
        tracked = tracking.track(model, inputs, expected, lambda o, t: loss(o, t, config), device)
    whole = 4 * kept.parameters
    memory = _memory(tracked, kept, whole_count, state * kept.parameters // whole_count, largest, sizes, count, device)
    shards, adds = kept.shards, adding(sizes)
    flops = {"forward": tracked.forward_flops, "backward": tracked.backward_flops}
    work = count / (sizes["tensor"] * sizes["pipeline"])
    document: dict[str, Any] = {
        "application": app.name,
        "world": world,
        "parallel": parallel,
        "mesh": {name: size for name, size in sizes.items() if size > 1},
        "batch": {"global": pretrain.batch_size, "process": batch, "micro_batches": count},
        "parameters": whole_count,
        "memory_bytes": memory,
        "flops": {name: int(value * work) for name, value in flops.items()},
        "message_bytes": _messages(whole, adds, shards) + kept.sent,
    }
    if probe:
        document["step_seconds_at_least"] = _seconds(document, probe)
    return document


def target_of(app: Application, preset: str, overrides: Sequence[str]) -> torch.Tensor:
    """Of one generated example: (1, ...)."""
    few = []
    for f in dataclasses.fields(app.configure(overrides, preset=preset).data):
        if f.type in ("int", int) and (f.name == "clients" or f.name.endswith("_per_client")):
            few.append(f"data.{f.name}={max(2, int(f.metadata.get('low', 2)))}")
    config = app.configure([*overrides, *few], preset=preset)
    return torch.from_numpy(app.generate(config, 0).examples(config).targets[:1].copy())


def _memory(
    tracked: tracking.Tracked,
    kept: Held,
    count: int,
    state: int,
    largest: int,
    sizes: Mapping[str, int],
    parts: int,
    device: str,
) -> dict[str, int]:
    """Bytes of a process by kind, at the higher of two points: in the backward pass, and in the optimiser's step."""
    share, mine = kept.shards, kept.parameters / count
    high = {k: int(v) for k, v in tracked.peak.items()}
    parameters = int(high.get("parameters", 0) * mine) // share
    whole = 4 * kept.parameters
    gradients = high.get("gradients", 0) * mine
    passes = {
        "parameters": parameters,
        "gradients": int(gradients if parts == 1 else whole) // share,
        "optimizer": state // share,
        "activations": int(high.get("activations", 0) * kept.in_flight),
        "temporaries": high.get("temporaries", 0) + kept.fetched,
        "halo": kept.halo,
        "inputs": high.get("inputs", 0) * parts,
    }
    step = {
        "parameters": parameters,
        "gradients": whole // share,
        "optimizer": state // share,
        "inputs": high.get("inputs", 0) * parts,
    }
    if share > 1:
        passes["gathered"] = 2 * largest  # one unit's parameters and gradients, whole
    elif adding(sizes) > 1 and sizes["pipeline"] == 1:  # DDP's buckets hold the gradients once more
        passes["buckets"] = step["buckets"] = whole
    found = {k: v for k, v in max(passes, step, key=lambda point: sum(point.values())).items() if v or k != "halo"}
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


def _messages(whole: int, adding: int, shards: int) -> int:
    """Bytes of parameters and gradients that a process sends in a step: a ring's all-reduce, or FSDP's two gathers and one
    scatter over the shards, and the all-reduce of its shard over the copies."""
    copies = adding // shards
    found = 3 * (shards - 1) / shards * whole if shards > 1 else 0
    return int(found + 2 * (copies - 1) / copies * whole / shards)


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
