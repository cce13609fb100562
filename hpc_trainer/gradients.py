"""Data parallelism with SUMMED gradients.

No ``from __future__ import annotations`` here: DDP checks the hook's annotations as objects, not as strings.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel


def sum_gradients(state: object, bucket: GradBucket) -> Future[Tensor]:
    """All-reduce by sum. DDP's default divides by the number of processes, which is wrong for global-count losses."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def data_parallel(model: nn.Module, world: int) -> nn.Module:
    """DDP over all processes; the model itself in a group of one. The loss is already divided by the global count."""
    if world == 1:
        return model
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, sum_gradients)
    return wrapped
