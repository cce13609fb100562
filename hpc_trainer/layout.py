"""How the processes are arranged: one mesh with named dimensions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import PretrainConfig

# The outermost first: neighbours in the last dimension are neighbouring ranks, on one node where that is possible.
# Processes along each of these have different samples of a batch, and so parts of the gradient to be summed.
DIMENSIONS = ("replicate", "data", "shard")
SHORTHAND = {"ddp": "data", "fsdp": "shard"}


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
                remedy=f"write such as replicate=2,shard=2; dimensions: {', '.join(DIMENSIONS)}",
            )
        sizes[found[1]] = int(found[2])
    if world > 1 and math.prod(sizes.values()) != world:  # one process is always the plain reference
        raise ConfigError(
            f"pretrain.mesh = {config.mesh!r} is made for {math.prod(sizes.values())} processes, {world} were started"
        )
    return sizes if world > 1 else dict.fromkeys(DIMENSIONS, 1)


@dataclass(frozen=True)
class Layout:
    """sizes: processes by dimension. samples: the group of all processes; None = alone."""

    sizes: Mapping[str, int]
    rank: int
    samples: ProcessGroup | None

    def is_split(self, *dimensions: str) -> bool:
        return any(self.sizes[d] > 1 for d in dimensions)

    @property
    def world(self) -> int:
        """Shares into which each global batch is cut."""
        return math.prod(self.sizes.values())


def arrange(config: PretrainConfig, rank: int, world: int) -> Layout:
    return Layout(mesh_sizes(config, world), rank, dist.group.WORLD if world > 1 else None)
