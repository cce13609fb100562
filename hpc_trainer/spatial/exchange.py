"""Rows of a tensor that is cut along one axis over processes: moved, summed and gathered, with exact gradients.

Each process holds its own copy of the computation, and the loss is the SUM of all processes' losses. Every operation here
has the true adjoint under that reading: rows that were sent come back as gradients and are added, and the gradient of a sum
over processes is summed over processes. Replicated values then need no care, and parameters' gradients are summed as in
data parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup  # type: ignore[attr-defined]

Range = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """axis: counted from the end, negative. bounds: process r of ``group`` holds rows bounds[r] .. bounds[r + 1] - 1."""

    axis: int
    bounds: tuple[int, ...]
    rank: int
    group: ProcessGroup

    @property
    def extent(self) -> int:
        """Rows over all processes."""
        return self.bounds[-1]

    @property
    def ranges(self) -> tuple[Range, ...]:
        return tuple(pairwise(self.bounds))

    @property
    def mine(self) -> Range:
        return self.bounds[self.rank], self.bounds[self.rank + 1]

    def at(self, axis: int, bounds: Sequence[int] | None = None) -> Split:
        return Split(axis, tuple(bounds) if bounds is not None else self.bounds, self.rank, self.group)


def even_split(extent: int, axis: int, group: ProcessGroup) -> Split:
    """As even as it goes: the first processes have a row more."""
    parts, rank = dist.get_world_size(group), dist.get_rank(group)
    return Split(axis, tuple((extent * r + parts - 1) // parts for r in range(parts + 1)), rank, group)


def rows(local: Tensor, split: Split, wanted: Sequence[Range], fill: float = 0.0) -> Tensor:
    """Rows ``wanted[rank]`` of the whole tensor on each process; rows outside of it are ``fill``. Differentiable."""
    if tuple(wanted) == split.ranges:
        return local
    made: Tensor = _Rows.apply(local, split, tuple(wanted), fill)
    return made


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, split: Split, wanted: tuple[Range, ...], fill: float) -> Tensor:
        ctx.split, ctx.wanted = split, wanted
        axis = local.dim() + split.axis
        first, last = wanted[split.rank]
        out = _empty(local, axis, last - first)
        outside = [(first, min(last, 0)), (max(first, split.extent), last)]
        for a, b in outside:
            if b > a:
                out.narrow(axis, a - first, b - a).fill_(fill)
        messages, received = [], []
        for peer in range(len(wanted)):
            a, b = _overlap(split.ranges[peer], wanted[split.rank])
            if peer == split.rank:
                if b > a:
                    out.narrow(axis, a - first, b - a).copy_(local.narrow(axis, a - split.mine[0], b - a))
                continue
            if b > a:
                received.append((_empty(local, axis, b - a), a - first))
                messages.append(_receive(received[-1][0], peer, split))
            a, b = _overlap(split.mine, wanted[peer])
            if b > a:
                messages.append(_send(local.narrow(axis, a - split.mine[0], b - a), peer, split))
        _deliver(messages)
        for part, place in received:
            out.narrow(axis, place, part.shape[axis]).copy_(part)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        split, wanted, grad = ctx.split, ctx.wanted, gradients[0]
        axis = grad.dim() + split.axis
        first, (low, high) = wanted[split.rank][0], split.mine
        out = _empty(grad, axis, high - low).zero_()
        messages, received = [], []
        for peer in range(len(wanted)):
            a, b = _overlap(split.mine, wanted[peer])
            if b > a and peer == split.rank:
                received.append((grad.narrow(axis, a - first, b - a), a - low))
            elif b > a:
                received.append((_empty(grad, axis, b - a), a - low))
                messages.append(_receive(received[-1][0], peer, split))
            a, b = _overlap(split.ranges[peer], wanted[split.rank])
            if b > a and peer != split.rank:
                messages.append(_send(grad.narrow(axis, a - first, b - a), peer, split))
        _deliver(messages)
        for part, place in received:  # by rank: the same order on every run
            out.narrow(axis, place, part.shape[axis]).add_(part)
        return out, None, None, None


def total(value: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group, on every process. Differentiable."""
    made: Tensor = _Total.apply(value, group)
    return made


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], ctx.group), None


def _summed(value: Tensor, group: ProcessGroup) -> Tensor:
    made = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(made, group=group)
    return made


def _overlap(a: Range, b: Range) -> Range:
    return max(a[0], b[0]), min(a[1], b[1])


def _empty(like: Tensor, axis: int, count: int) -> Tensor:
    return like.new_empty((*like.shape[:axis], count, *like.shape[axis + 1 :]))


def _send(part: Tensor, peer: int, split: Split) -> P2POp:
    return P2POp(dist.isend, part.contiguous(), group=split.group, group_peer=peer)


def _receive(part: Tensor, peer: int, split: Split) -> P2POp:
    return P2POp(dist.irecv, part, group=split.group, group_peer=peer)


def _deliver(messages: list[P2POp]) -> None:
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
