"""A model on its processes: replicated, with gradients SUMMED over them. The other placements build on this one.

No ``from __future__ import annotations`` here: DDP checks the hook's annotations as objects, not as strings.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from fl_core.contracts.arrays import Arrays, check_like
from hpc_trainer.layout import Layout

Table = dict[str, npt.NDArray[Any]]


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
        wrapped = DistributedDataParallel(self.model, process_group=self.layout.summed, broadcast_buffers=False)
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

    def load(self, arrays: Arrays, *, origin: str) -> None:
        """Whole arrays by name. Raises IntegrityError naming ``origin`` and the array that does not fit."""
        check_like(arrays, self.arrays(), origin=origin)
        with torch.no_grad():
            for name, tensor in self.model.state_dict(keep_vars=True).items():  # of a stage: its own alone
                tensor.copy_(self.part(torch.from_numpy(np.array(arrays[name])), tensor))

    def whole(self, tensor: Tensor, parameter: Tensor) -> npt.NDArray[Any]:
        """The whole tensor of which this process has a part, cut as ``parameter`` is; collective."""
        return np.array(tensor.detach().cpu().numpy())

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """What this process keeps of ``whole``, as it keeps of ``parameter``."""
        return whole

    def state_of_all(self, table: Table) -> Table:
        """This process's table of ``optimizer_state`` -> the whole model's; collective."""
        return table

    def state_of_mine(self, table: Arrays) -> Arrays:
        """The whole model's table of ``optimizer_state`` -> this process's."""
        return table


def forward(module: nn.Module, inputs: tuple[Tensor, ...], config: Any) -> Any:
    """Outputs in full precision, computed in the configured one."""
    if config.pretrain.precision == "full":
        return module(*inputs)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        outputs = module(*inputs)
    return tuple(o.float() for o in outputs) if isinstance(outputs, tuple) else outputs.float()
