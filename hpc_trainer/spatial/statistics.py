"""Sums, means and normalisations over axes of which one may be cut: over all processes' rows together."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from hpc_trainer.batch_norm import channels
from hpc_trainer.spatial.exchange import total
from hpc_trainer.spatial.part import Part, handles, local, name_of, position, refuse, whole_shape, wrap


def _axes(x: Part, dim: Any) -> list[int]:
    """From the front, sorted; None and () are all of them."""
    if dim is None or dim in ((), []):
        return list(range(x.dim()))
    return sorted({d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)})


def _kept(x: Part, reduced: Tensor, axes: list[int], keepdim: bool) -> Part:
    """A reduction over axes that are not cut: the cut one is where it was, or some axes nearer to the end."""
    behind = sum(a > position(x) for a in axes)
    return wrap(reduced, x.placed if keepdim else x.placed.at(x.placed.axis + behind))


@handles(torch.sum, Tensor.sum, torch.mean, Tensor.mean)
def _sum(func: Any, args: Any, kwargs: Any) -> Any:
    def read(input: Part, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        return input, dim, keepdim, dtype

    x, dim, keepdim, dtype = read(*args, **kwargs)
    axes = _axes(x, dim)
    found = local(x).sum(axes, keepdim=keepdim, dtype=dtype)
    count = math.prod(whole_shape(x)[a] for a in axes) if func.__name__ == "mean" else 1
    if position(x) not in axes:
        return _kept(x, found / count if count != 1 else found, axes, keepdim)
    return total(found, x.placed.group) / count if count != 1 else total(found, x.placed.group)


@handles(torch.amax, Tensor.amax, torch.amin, Tensor.amin)
def _extreme(func: Any, args: Any, kwargs: Any) -> Any:
    def read(input: Part, dim: Any = (), keepdim: bool = False) -> Any:
        return input, dim, keepdim

    x, dim, keepdim = read(*args, **kwargs)
    axes = _axes(x, dim)
    if position(x) not in axes:
        return _kept(x, func(local(x), axes, keepdim), axes, keepdim)
    made: Tensor = _Extreme.apply(local(x), axes, keepdim, func.__name__ == "amax", x.placed.group)
    return made


class _Extreme(torch.autograd.Function):
    """Largest or smallest over all processes; equal ones share the gradient evenly, as torch's amax has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: list[int], keepdim: bool, largest: bool, group: ProcessGroup) -> Tensor:
        worst = float("-inf") if largest else float("inf")
        empty = any(x.shape[a] == 0 for a in axes)
        shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
        found = x.new_full(shape, worst) if empty else (x.amax if largest else x.amin)(axes, keepdim=True)
        found = found.contiguous()
        dist.all_reduce(found, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN, group=group)
        hits = x == found
        count = hits.sum(axes, keepdim=True)
        dist.all_reduce(count, group=group)
        ctx.save_for_backward(hits, count)
        ctx.group = group
        return found if keepdim else found.reshape([n for a, n in enumerate(x.shape) if a not in axes])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hits, count = ctx.saved_tensors
        grad = gradients[0].reshape(count.shape).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return hits * (grad / count), None, None, None, None


@handles(functional.batch_norm)
def _batch_norm(func: Any, args: Any, kwargs: Any) -> Part:
    """By running statistics; or by those of the whole batch of this group, and then also their running averages."""

    def read(
        input: Part,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        return input, running_mean, running_var, weight, bias, training, momentum, eps

    x, mean, var, weight, bias, training, momentum, eps = read(*args, **kwargs)
    if position(x) < 2:
        refuse(f"{name_of(func)} with the batch or the channels cut")
    if not training:
        return wrap(func(local(x), mean, var, weight, bias, False, momentum, eps), x.placed)
    shape = whole_shape(x)
    count = math.prod(shape) // shape[1]
    made, found_mean, found_var = _normalised(x, 0, weight, bias, eps)
    if mean is not None and var is not None:
        with torch.no_grad():
            mean.copy_((1 - momentum) * mean + momentum * found_mean.flatten())
            var.copy_((1 - momentum) * var + momentum * found_var.flatten() * (count / max(1, count - 1)))
    return made


@handles(functional.group_norm, torch.group_norm)
def _group_norm(func: Any, args: Any, kwargs: Any) -> Part:
    def read(
        input: Part,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Any:
        return input, num_groups, weight, bias, eps

    x, groups, weight, bias, eps = read(*args, **kwargs)
    if position(x) < 2:
        refuse(f"{name_of(func)} with the batch or the channels cut")
    return _normalised(x, groups, weight, bias, eps)[0]


@handles(functional.instance_norm)
def _instance_norm(func: Any, args: Any, kwargs: Any) -> Part:
    def read(
        input: Part,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if running_mean is not None or not use_input_stats:
            refuse(f"{name_of(func)} with running statistics")
        return input, weight, bias, eps

    x, weight, bias, eps = read(*args, **kwargs)
    if position(x) < 2:
        refuse(f"{name_of(func)} with the batch or the channels cut")
    return _normalised(x, x.shape[1], weight, bias, eps)[0]


@handles(functional.layer_norm, torch.layer_norm)
def _layer_norm(func: Any, args: Any, kwargs: Any) -> Part:
    x, shape = args[0], args[1]
    if -x.placed.axis <= len(shape):
        refuse(f"{name_of(func)} over the cut axis")
    return wrap(func(local(x), *args[1:], **kwargs), x.placed)


def _normalised(x: Part, groups: int, weight: Any, bias: Any, eps: float) -> tuple[Part, Tensor, Tensor]:
    """Each of ``groups`` groups of channels of each sample on its own; 0: each channel of all samples together."""
    made, mean, var = _Normalise.apply(local(x), whole_shape(x), groups, weight, bias, eps, x.placed.group)
    return wrap(made, x.placed), mean, var


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) weight + bias; only x and two numbers a group are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: torch.Size,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ctx.groups, ctx.group, ctx.wide = groups, group, wide
        ctx.count = math.prod(shape) // (shape[1] if groups == 0 else shape[0] * groups)
        seen = _grouped(x.to(wide), groups)
        mean = _all(_over(seen, groups), ctx.count, group)
        centred = seen - mean.to(wide)
        var = _all(_over(centred.square(), groups), ctx.count, group)
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.has_bias = bias is not None
        made = (centred * invstd.to(wide)).reshape(x.shape)
        if weight is not None:
            made *= channels(weight.to(wide), x)
        if bias is not None:
            made += channels(bias.to(wide), x)
        ctx.mark_non_differentiable(mean, var)
        return made.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        grad = gradients[0].to(ctx.wide)
        normal = (_grouped(x.to(ctx.wide), ctx.groups) - mean.to(ctx.wide)) * invstd.to(ctx.wide)
        others = [0, *range(2, x.dim())]
        weight_grad = (grad * normal.reshape(x.shape)).sum(others).to(weight.dtype) if weight is not None else None
        bias_grad = grad.sum(others).to(x.dtype if weight is None else weight.dtype) if ctx.has_bias else None
        inner = _grouped(grad if weight is None else grad * channels(weight.to(ctx.wide), x), ctx.groups)
        shift, slope = _all(
            torch.stack([_over(inner, ctx.groups), _over(inner * normal, ctx.groups)]), ctx.count, ctx.group
        ).to(ctx.wide)
        made = (inner - shift - normal * slope) * invstd.to(ctx.wide)
        return made.reshape(x.shape).to(x.dtype), None, None, weight_grad, bias_grad, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, groups, values), or (N, C, values) where a channel's statistics are those of all samples."""
    parts = groups or x.shape[1]
    return x.reshape(x.shape[0], parts, x.numel() // (x.shape[0] * parts))


def _over(x: Tensor, groups: int) -> Tensor:
    """Sums of what is normalised together, in float64; a sample's values are summed in their own type."""
    found = x.sum(2, keepdim=True).double()
    return found if groups else found.sum(0, keepdim=True)


def _all(sums: Tensor, count: int, group: ProcessGroup) -> Tensor:
    dist.all_reduce(sums, group=group)
    return sums / count
