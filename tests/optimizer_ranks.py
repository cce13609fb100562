"""A small net trained in float64 by one optimiser configuration, alone or as one rank of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import build_optimizer, known_optimizers
from hpc_trainer import optimizer_state
from hpc_trainer.processes import Processes

STEPS, COUNT, BATCH = 12, 9, 5  # the tail batch has 4, 3 or 1 examples: some ranks are empty in it
CONFIG = OptimizerConfig(lr=0.003, momentum=0.9, weight_decay=0.01, update_every=3, decay=0.8, damping=0.01, trust=0.1)
VARIANTS = {
    **{name: replace(CONFIG, name=name) for name in known_optimizers()},
    "kfac owner": replace(CONFIG, name="kfac", inverses="owner"),
    "kfac blocks": replace(CONFIG, name="kfac", max_factor=7, measure_every=2),
    "kfac diagonal": replace(CONFIG, name="kfac", max_factor=1),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(75, 3),
    ).double()


def train(config: OptimizerConfig, group: dist.ProcessGroup | None) -> dict[str, npt.NDArray[Any]]:
    """Parameters and gathered state after STEPS steps, each over a global batch split among the ranks."""
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    model = net()
    optimizer = build_optimizer(model, config, group)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(COUNT, 2, 6, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 3, (COUNT,), generator=generator)
    weights = torch.rand(COUNT, dtype=torch.float64, generator=generator) + 0.5
    for step in range(STEPS):
        start = step * BATCH % COUNT
        index = np.array_split(np.arange(start, min(start + BATCH, COUNT)), world)[rank]
        empty = len(index) == 0
        mine = torch.from_numpy(np.zeros(1, np.int64) if empty else index)
        optimizer.zero_grad(set_to_none=True)
        losses = nn.functional.cross_entropy(model(inputs[mine]), targets[mine], reduction="none")
        share = weights[mine] * (0.0 if empty else 1.0)
        total = share.sum()
        if group is not None:
            dist.all_reduce(total, group=group)
        ((losses * share).sum() / total).backward()
        if group is not None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
    found = {f"model/{k}": v.detach().numpy() for k, v in model.state_dict().items()}
    return {**found, **optimizer_state.save(optimizer)}


def train_all(processes: Processes, out: Path) -> None:
    results = {name: train(config, processes.group) for name, config in VARIANTS.items()}
    if processes.is_main:
        np.savez(out, **{f"{name}|{key}": value for name, table in results.items() for key, value in table.items()})
