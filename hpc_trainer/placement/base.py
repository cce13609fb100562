"""A model on its processes: replicated, with gradients SUMMED over them. The other placements build on this one.

No ``from __future__ import annotations`` here: DDP checks the hook's annotations as objects, not as strings.
"""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpc_trainer.layout import Layout

Table = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The region of a whole tensor that this process holds, and which of the ``copies`` processes that hold the same it is."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    copy: int
    copies: int

    @classmethod
    def uncut(cls, tensor: Tensor, holders: tuple[int, int]) -> Self:
        return cls(shape=tuple(tensor.shape), offset=(0,) * tensor.dim(), copy=holders[0], copies=holders[1])


def sum_gradients(group: ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """All-reduce by sum. DDP's default divides by the number of processes, which is wrong for global-count losses."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class Placement:
    """``model``: the application's module, its own names; ``module``: what a forward pass calls.

    Every process of the layout makes the same calls in the same order: most of them are collective.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.module = self._wrapped()

    def _wrapped(self) -> nn.Module:
        """DDP over all processes whose gradients add up; the model itself in a group of one."""
        if self.layout.summed is None:
            return self.model
        wrapped = DistributedDataParallel(self.model, process_group=self.layout.summed, forward_sync_buffers=False)
        wrapped.register_comm_hook(self.layout.summed, sum_gradients)
        return wrapped

    def outputs(self, inputs: tuple[Tensor, ...], config: Any) -> Any:
        """Of this process's samples, without a loss."""
        return forward(self.module, inputs, config)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the passes of one micro-batch; gradients are summed over processes with the last one."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def scale_gradients(self, factor: Tensor) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor.to(grads[0].dtype))

    def clip(self, norm: float) -> None:
        """By the norm of all gradients together (Pascanu et al. 2013), wherever they lie."""
        nn.utils.clip_grad_norm_(self.parameters(), norm)

    def arrays(self) -> Table:
        """Copies of all parameters and buffers, whole, by name; collective."""
        return {k: self.whole(v, v) for k, v in self.model.state_dict(keep_vars=True).items()}

    def gradients(self) -> Table:
        """Whole gradients by parameter name, after they were summed; collective."""
        return {k: self.whole(p.grad, p) for k, p in self.model.named_parameters() if p.grad is not None}

    def local(self, tensor: Tensor) -> Tensor:
        """This process's values of a parameter, a buffer or a state cut as one; they share its memory."""
        return tensor.detach()

    def like(self, values: Tensor, parameter: Tensor) -> Tensor:
        """This process's values of a state that lies as ``parameter`` does, as the optimiser holds them."""
        return values

    def whole(self, tensor: Tensor, parameter: Tensor) -> npt.NDArray[Any]:
        """The whole tensor of which this process has a part, cut as ``parameter`` is; collective."""
        return np.array(tensor.detach().cpu().numpy())

    def placed(self, tensor: Tensor, parameter: Tensor | None) -> Placed:
        """Where ``tensor`` lies: cut as ``parameter`` where it has its shape; None: it belongs to no parameter."""
        return Placed.uncut(tensor, everyone())

    def number_in_model(self, number: int) -> int:
        """Of a parameter that the optimiser of this process calls ``number``."""
        return number

    def number_here(self, number: int) -> int | None:
        """The other way; None: the parameter is not on this process."""
        return number


def everyone() -> tuple[int, int]:
    """(rank, size) of the whole job."""
    return group_place(dist.group.WORLD) if dist.is_initialized() else (0, 1)


def group_place(group: ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def forward(module: nn.Module, inputs: tuple[Tensor, ...], config: Any) -> Any:
    """Outputs in full precision, computed in the configured one."""
    if config.pretrain.precision == "full":
        return module(*inputs)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        outputs = module(*inputs)
    return tuple(o.float() for o in outputs) if isinstance(outputs, tuple) else outputs.float()
