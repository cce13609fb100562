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
from torch.distributed.tensor import DTensor, distribute_tensor

from hpc_trainer.placement.base import Placement
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

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole
        at = whole.to(device=parameter.device, dtype=parameter.dtype)
        return distribute_tensor(at, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def scale_gradients(self, factor: Tensor) -> None:
        for p in self.parameters():
            if isinstance(p.grad, DTensor):
                with torch.no_grad():
                    p.grad.to_local().mul_(factor.to(p.grad.dtype))
