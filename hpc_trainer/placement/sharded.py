"""FSDP2 and HSDP: parameters, gradients and optimiser state cut over processes (Zhao et al., VLDB 2023; ZeRO-3)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from hpc_trainer.placement.base import Placed, Placement
from hpc_trainer.placement.blocks import blocks

SMALLEST = 2**16  # elements: smaller blocks travel with the model's root


class Sharded(Placement):
    """Cut over ``shard`` and ``spatial``; whole copies along ``replicate`` and ``data``. Gradients are summed over all."""

    def _wrapped(self) -> nn.Module:
        mesh = self._mesh()
        for block in blocks(self.model):
            if sum(p.numel() for p in block.parameters()) >= SMALLEST:
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for module in self._units():
            module.set_force_sum_reduction_for_comms(True)  # gloo, and every backend, then adds plainly
            module.set_gradient_divide_factor(1.0)
        return self.model

    def _mesh(self) -> DeviceMesh:
        device = next(self.model.parameters()).device.type
        sizes = self.layout.sizes
        copies = sizes["replicate"] * sizes["data"]
        shape, names = (sizes["shard"] * sizes["spatial"],), ("shard",)
        if copies > 1:
            return init_device_mesh(device, (copies, *shape), mesh_dim_names=("replicate", *names))
        return init_device_mesh(device, shape, mesh_dim_names=names)

    def _units(self) -> list[FSDPModule]:
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        for unit in self._units():
            unit.set_requires_gradient_sync(last, recurse=False)
        return contextlib.nullcontext()

    def whole(self, tensor: Tensor, parameter: Tensor) -> npt.NDArray[Any]:
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return np.array(value.detach().cpu().numpy())

    def local(self, tensor: Tensor) -> Tensor:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()

    def like(self, values: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return values
        return DTensor.from_local(
            values.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def placed(self, tensor: Tensor, parameter: Tensor | None) -> Placed:
        """FSDP cuts the first axis into equal chunks, of which the last may be smaller or empty."""
        if not isinstance(tensor, DTensor):
            return super().placed(tensor, parameter)
        mesh, offset, holders = tensor.device_mesh, [0] * tensor.dim(), (0, 1)
        for dimension, placement in enumerate(tensor.placements):
            size, rank = mesh.size(dimension), mesh.get_local_rank(dimension)
            if isinstance(placement, Replicate):
                holders = (rank, size)
            else:
                assert placement == Shard(0), placement
                chunk = -(-tensor.shape[0] // size)
                offset[0] = min(tensor.shape[0], rank * chunk)
                assert self.local(tensor).shape[0] == min(tensor.shape[0], offset[0] + chunk) - offset[0]
        return Placed(shape=tuple(tensor.shape), offset=tuple(offset), copy=holders[0], copies=holders[1])

    def scale_gradients(self, factor: Tensor) -> None:
        for p in self.parameters():
            if isinstance(p.grad, DTensor):
                with torch.no_grad():
                    p.grad.to_local().mul_(factor.to(p.grad.dtype))
