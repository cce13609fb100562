"""Batch normalisation over all processes (Ioffe & Szegedy 2015), for 1-D, 2-D and 3-D, on CPU and GPU.

torch's own ``SyncBatchNorm`` refuses the CPU and a process without samples. Here each process computes count, mean and
centred squares of its samples in float64; they are gathered once and merged pairwise (Chan, Golub & LeVeque 1979), so that
no large sums cancel. The backward pass sums its two reductions over the processes in float64. A process without samples
takes part with count 0. Parameters' gradients are local: they are summed with all others.

One process uses it too: torch's CPU kernel sums in float32, and costs whole digits on large maps.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fl_core.learning.micro_batch import current
from fl_core.learning.normalization import GhostBatchNorm


def synchronise_batch_norm(model: nn.Module, group: ProcessGroup | None) -> nn.Module:
    """Every batch norm in ``model`` replaced by one over ``group``, with the very same parameters and buffers.

    None: a group of one. Returns the model, or its replacement where the model itself is a batch norm.
    """
    if normalises_by_batch(model) and not isinstance(model, SynchronisedBatchNorm):
        return SynchronisedBatchNorm(model, group)
    for name, child in model.named_children():
        setattr(model, name, synchronise_batch_norm(child, group))
    return model


def normalises_by_batch(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """By all samples that it sees at once; ghost batches are part of the model's definition."""
    return isinstance(layer, _BatchNorm) and not isinstance(layer, GhostBatchNorm)


class SynchronisedBatchNorm(_BatchNorm):
    """(N, C, ...) -> the same shape, normalised by the statistics of all processes' samples together.

    One value a channel in the whole group has no variance: it is normalised with the running statistics and leaves
    them as they are, as ``fl_core.learning.normalization`` does in one process.
    """

    def __init__(self, layer: _BatchNorm, group: ProcessGroup | None) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.group = group
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.training = layer.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return self._by_running_statistics(input)
        real = current().real
        count, mean, var = global_statistics(input.detach()[:real], self.group)
        if count <= 1 and self.running_mean is not None:
            return self._by_running_statistics(input)
        if self.training and not current().recomputed:
            self._track(count, mean, var)
        made: Tensor = _Normalise.apply(
            input, self.weight, self.bias, mean, (var + self.eps).rsqrt(), count, real, self.group
        )
        return made

    def _by_running_statistics(self, input: Tensor) -> Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _track(self, count: float, mean: Tensor, var: Tensor) -> None:
        """Running mean and UNBIASED variance, as torch keeps them."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, found in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            running.copy_((1 - share) * running.double() + share * found)


def leave_out_of_compilation(model: nn.Module) -> None:
    """Before ``model.compile()``: counts and collectives stay outside its graphs. Not a decorator: that imports the compiler."""
    for layer in model.modules():
        if isinstance(layer, SynchronisedBatchNorm):
            layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]


def global_statistics(x: Tensor, group: ProcessGroup | None) -> tuple[float, Tensor, Tensor]:
    """(count, mean, biased variance) of each channel over the group; count values a channel, (C,) float64 the others."""
    facts = local_statistics(x)
    if group is None:
        count, (mean, squares) = x.numel() // x.shape[1], facts[1:].view(2, -1)
        return float(count), mean, squares / max(1, count)
    gathered = facts.new_empty(dist.get_world_size(group) * len(facts))
    dist.all_gather_single(gathered, facts, group=group)
    table = gathered.view(-1, len(facts))
    counts, means, squares = table[:, :1], table[:, 1 : 1 + x.shape[1]], table[:, 1 + x.shape[1] :]
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp_min(1)
    squared = (squares + counts * (means - mean) ** 2).sum(0)
    return float(total), mean, squared / total.clamp_min(1)


def local_statistics(x: Tensor) -> Tensor:
    """(1 + 2 C,) float64: values a channel, their means, their centred squares; zeros where there are none.

    Each sample is summed in its own type (half precision in float32) by torch's cascade, samples in float64.
    """
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(1 + 2 * x.shape[1], dtype=torch.float64)
    wide = x if x.dtype == torch.float64 else x.float()
    mean = _sums(wide) / count
    centre = mean.to(wide.dtype)
    squares = _sums((wide - channels(centre, x)).square()) - count * (mean - centre) ** 2
    return torch.cat([mean.new_tensor([float(count)]), mean, squares.clamp_min(0)])


def _sums(x: Tensor) -> Tensor:
    """(N, C, ...) -> (C,) float64."""
    each = x.flatten(2).sum(2) if x.dim() > 2 else x
    return each.double().sum(0)


def channels(value: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped for broadcasting over ``like`` (N, C, ...)."""
    return value.view(1, -1, *(1,) * (like.dim() - 2))


class _Normalise(torch.autograd.Function):
    """y = (x - mean) invstd weight + bias, where mean and variance are functions of all processes' real samples."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: float,
        real: int | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = invstd if weight is None else invstd * weight.detach()
        scale, centre = scale.to(wide), mean.to(wide)
        ctx.save_for_backward(x, weight, centre, invstd, scale)
        ctx.count, ctx.real, ctx.group, ctx.wide = count, real, group, wide
        ctx.has_bias = bias is not None
        made = (x.to(wide) - channels(centre, x)) * channels(scale, x)
        if bias is not None:
            made += channels(bias.detach().to(wide), x)
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, invstd, scale = ctx.saved_tensors
        grad = grads[0].to(ctx.wide)
        centred = x.to(ctx.wide) - channels(mean, x)
        mine = slice(ctx.real)
        sums = torch.stack([_sums(grad[mine]), _sums(grad[mine] * centred[mine])])
        weight_grad = (sums[1] * invstd).to(weight.dtype) if weight is not None else None
        bias_grad = sums[0].to(weight.dtype, copy=True) if weight is not None and ctx.has_bias else None
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        sums /= ctx.count
        shift, slope = sums[0].to(ctx.wide), (sums[1] * invstd**2).to(ctx.wide)
        made = grad.clone()
        made[mine] -= channels(shift, x) + centred[mine] * channels(slope, x)
        made *= channels(scale, x)
        return made.to(x.dtype), weight_grad, bias_grad, None, None, None, None, None
