"""How the processes are arranged: one mesh with named dimensions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import PretrainConfig

# The outermost first: neighbours in the last dimension are neighbouring ranks, on one node where that is possible.
# Processes along SAMPLES have different samples of a batch, along ``spatial`` different parts of each of them: the
# gradients of all these add up. Along ``pipeline`` they have different layers, along ``tensor`` different channels of the layers.
SAMPLES = ("replicate", "data", "shard")
DIMENSIONS = (*SAMPLES, "spatial", "pipeline", "tensor")
PARTS = ("spatial", "pipeline", "tensor")  # processes with the same samples
REST = {"ddp": "data", "fsdp": "shard", "hsdp": "shard"}  # takes the processes that pretrain.mesh does not speak of


def mesh_sizes(config: PretrainConfig, world: int) -> dict[str, int]:
    """dimension -> processes, every dimension named. Raises ConfigError where they do not make up ``world``."""
    sizes = _named(config)
    if world == 1:  # one process is always the plain reference
        return dict.fromkeys(DIMENSIONS, 1)
    rest = REST[config.parallel]
    if config.parallel == "hsdp" and "replicate" not in sizes and world % 2 == 0:
        sizes["replicate"] = 2
    named = math.prod(sizes.values())
    if rest not in sizes and world % named == 0:
        sizes[rest] = world // named
    elif named != world:
        raise ConfigError(
            f"pretrain.mesh = {config.mesh!r} is made for {'multiples of ' if rest not in sizes else ''}{named} processes, "
            f"{world} were started"
        )
    return {name: sizes.get(name, 1) for name in DIMENSIONS}


def _named(config: PretrainConfig) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in config.mesh.split(",") if config.mesh else []:
        found = re.fullmatch(r"\s*([a-z]+)\s*=\s*([1-9][0-9]*)\s*", part)
        if not found or found[1] not in DIMENSIONS:
            raise ConfigError(
                f"pretrain.mesh = {config.mesh!r}: {part!r} is not a dimension with its size",
                remedy=f"write such as data=2,spatial=2; dimensions: {', '.join(DIMENSIONS)}",
            )
        sizes[found[1]] = int(found[2])
    return sizes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """sizes: processes by dimension. share: which of the ``shares`` of each global batch is this process's.

    summed: the group whose losses and gradients add up, all samples and all parts of them; None = alone.
    samples: those of ``summed`` that have the same part of other samples; None = alone.
    spatial: those that have other parts of the same samples; None where samples are whole.
    pipeline: those that have other layers, and see the same samples one after the other; None where models are whole.
    tensor: those that have other channels of the layers, and the same samples; None where layers are whole.
    sharded: parameters lie in pieces on the processes whose gradients add up.
    """

    sizes: Mapping[str, int]
    share: int = 0
    sharded: bool = False
    summed: ProcessGroup | None = None
    samples: ProcessGroup | None = None
    spatial: ProcessGroup | None = None
    pipeline: ProcessGroup | None = None
    tensor: ProcessGroup | None = None

    def is_split(self, *dimensions: str) -> bool:
        return any(self.sizes[d] > 1 for d in dimensions)

    @property
    def shares(self) -> int:
        """Into which each global batch is cut."""
        return math.prod(self.sizes[d] for d in SAMPLES)

    @property
    def copies(self) -> int:
        """Processes that compute the very same loss, each from its part of the samples."""
        return self.sizes["spatial"]

    @property
    def first_of_copies(self) -> bool:
        """Whether this process speaks for its share."""
        return self.spatial is None or dist.get_rank(self.spatial) == 0


def arrange(config: PretrainConfig, rank: int, world: int, device: str = "cpu") -> Layout:
    """Collective: makes the groups of a mesh of several dimensions."""
    sizes = mesh_sizes(config, world)
    cut = sizes["shard"] * (sizes["spatial"] if config.parallel != "ddp" else 1)
    layout = Layout(sizes=sizes, share=rank // math.prod(sizes[d] for d in PARTS), sharded=cut > 1)
    if world == 1:
        return layout
    if not layout.is_split(*PARTS):
        return replace(layout, summed=dist.group.WORLD, samples=dist.group.WORLD)
    shape = (layout.shares, *(sizes[d] for d in PARTS))
    mesh = init_device_mesh(device, shape, mesh_dim_names=("samples", *PARTS))
    summed = mesh["samples", "spatial"]._flatten("summed")
    samples, spatial, pipeline, tensor = (_group(mesh[name]) for name in ("samples", *PARTS))
    return replace(layout, summed=_group(summed), samples=samples, spatial=spatial, pipeline=pipeline, tensor=tensor)


def _group(mesh: DeviceMesh) -> ProcessGroup | None:
    return mesh.get_group() if mesh.size() > 1 else None
