"""The three decisions on which it rests that a loss does not depend on the number of processes.

``RIGHT`` is what trains. ``BROKEN`` holds the mistakes that everybody makes once; ``verify-loss --break`` trains with one
of them, to show that the checker sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fl_core.learning import seeding
from hpc_trainer.batch_norm import synchronise_batch_norm
from hpc_trainer.sampler import global_batches


def global_sum(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """(numerator, denominator, ...) of this process -> of the group; the loss is divided by the group's denominator."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """shares: this process's part of each global batch; synchronise: makes batch norms see the global batch;
    total: sums over processes, in place."""

    shares: Callable[..., Iterator[npt.NDArray[np.int64]]] = global_batches
    synchronise: Callable[[nn.Module, ProcessGroup | None], nn.Module] = synchronise_batch_norm
    total: Callable[[Tensor, ProcessGroup | None], Tensor] = global_sum


def local_statistics(model: nn.Module, group: ProcessGroup | None) -> nn.Module:
    """Each process normalises its own share: what torch does unless it is told otherwise."""
    return synchronise_batch_norm(model, None)


def mean_of_means(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """Each process divides by its own count and the means are averaged: what DDP does with a mean loss."""
    if group is None:
        return sums
    world = dist.get_world_size(group)
    mean, rest = sums[0] / sums[1], sums[2:].clone()
    dist.all_reduce(mean, group=group)
    dist.all_reduce(rest, group=group)
    divisor = sums[1] * world
    return sums.copy_(torch.cat([torch.stack([mean / world * divisor, divisor]), rest]))


def padded_shares(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int, world: int, unit: int = 1, start: int = 0
) -> Iterator[npt.NDArray[np.int64]]:
    """Samples repeated until every process has as many: what torch's DistributedSampler does."""
    order: npt.NDArray[Any] = seeding.generator(seed, "global order", epoch).permutation(count)
    order = np.concatenate([order, order[: -count % world]])[rank::world]
    size = batch_size // world
    for at in range(start * size, len(order), size):
        yield order[at : at + size]


RIGHT = Recipe()
BROKEN = {
    "local-bn": replace(RIGHT, synchronise=local_statistics),
    "rank-mean": replace(RIGHT, total=mean_of_means),
    "pad-sampler": replace(RIGHT, shares=padded_shares),
}
