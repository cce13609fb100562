"""How the processes are arranged: one mesh with named dimensions, and the groups that its lines and planes form."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import PretrainConfig

# The outermost first: neighbours in the last dimension are neighbouring ranks, on one node where that is possible.
DIMENSIONS = ("pipeline", "replicate", "data", "shard", "spatial", "tensor")
SAMPLES = ("replicate", "data", "shard")  # processes along these have different samples of a batch
SUMMED = (*SAMPLES, "spatial")  # ... along these, different parts of each parameter's gradient
SHORTHAND = {"ddp": "data", "fsdp": "shard", "tensor": "tensor", "spatial": "spatial", "pipeline": "pipeline"}


def mesh_sizes(config: PretrainConfig, world: int) -> dict[str, int]:
    """dimension -> processes, every dimension named. Raises ConfigError where they do not make up ``world``."""
    sizes = dict.fromkeys(DIMENSIONS, 1)
    if not config.mesh:
        if config.parallel == "hsdp":
            sizes |= {"replicate": 2, "shard": world // 2} if world % 2 == 0 else {"shard": world}
        else:
            sizes[SHORTHAND[config.parallel]] = world
        return sizes
    for part in config.mesh.split(","):
        found = re.fullmatch(r"\s*([a-z]+)\s*=\s*([1-9][0-9]*)\s*", part)
        if not found or found[1] not in DIMENSIONS:
            raise ConfigError(
                f"pretrain.mesh = {config.mesh!r}: {part!r} is not a dimension with its size",
                remedy=f"write such as data=2,tensor=2; dimensions: {', '.join(DIMENSIONS)}",
            )
        sizes[found[1]] = int(found[2])
    if world > 1 and math.prod(sizes.values()) != world:  # one process is always the plain reference
        raise ConfigError(
            f"pretrain.mesh = {config.mesh!r} is made for {math.prod(sizes.values())} processes, {world} were started"
        )
    return sizes if world > 1 else dict.fromkeys(DIMENSIONS, 1)


@dataclass(frozen=True)
class Layout:
    """sizes and coordinates: by dimension. samples, summed: groups over the dimensions of the same name; None = alone."""

    sizes: Mapping[str, int]
    coordinates: Mapping[str, int]
    groups: Mapping[str, ProcessGroup | None]
    samples: ProcessGroup | None
    summed: ProcessGroup | None

    def is_split(self, *dimensions: str) -> bool:
        return any(self.sizes[d] > 1 for d in dimensions)

    @property
    def sample_world(self) -> int:
        """Shares into which each global batch is cut."""
        return math.prod(self.sizes[d] for d in SAMPLES)

    @property
    def sample_rank(self) -> int:
        rank = 0
        for d in SAMPLES:
            rank = rank * self.sizes[d] + self.coordinates[d]
        return rank

    @property
    def copies(self) -> int:
        """Processes that compute the same loss: those of one pipeline, one volume, one tensor group."""
        return math.prod(self.sizes.values()) // self.sample_world


def arrange(config: PretrainConfig, rank: int, world: int) -> Layout:
    """Collective: all processes make all groups, in the same order."""
    sizes = mesh_sizes(config, world)
    coordinates = dict(zip(DIMENSIONS, _place(rank, list(sizes.values())), strict=True))
    groups = {d: _group_over((d,), sizes, rank) for d in DIMENSIONS}
    return Layout(sizes, coordinates, groups, _group_over(SAMPLES, sizes, rank), _group_over(SUMMED, sizes, rank))


def _place(rank: int, sizes: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(sizes):
        rank, place = divmod(rank, size)
        found.append(place)
    return found[::-1]


def _group_over(dimensions: Sequence[str], sizes: Mapping[str, int], rank: int) -> ProcessGroup | None:
    """The group of processes that differ from ``rank`` in these dimensions only; None for a group of one."""
    world = math.prod(sizes.values())
    if math.prod(sizes[d] for d in dimensions) == 1:
        return None
    if all(sizes[d] == 1 for d in DIMENSIONS if d not in dimensions):
        return dist.group.WORLD
    lines: dict[Any, list[int]] = {}
    for other in range(world):
        place = dict(zip(DIMENSIONS, _place(other, list(sizes.values())), strict=True))
        lines.setdefault(tuple(place[d] for d in DIMENSIONS if d not in dimensions), []).append(other)
    mine = None
    for members in itertools.chain(lines.values()):
        group = dist.new_group(members)
        if rank in members:
            mine = group
    return mine
