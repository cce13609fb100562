"""Tensor parallelism: the output channels of linear layers and convolutions, cut over processes (Shoeybi et al. 2019).

Each process holds and computes its output channels of a layer and gathers the others'. Between two layers of a sequence with
nothing but channel-wise layers between them, nothing is gathered: the second layer holds its INPUT channels and the sums of
its outputs are added up. DTensor covers linear layers only; its convolutions are silently wrong (pytorch issue 186129).

Every process of the group computes the same loss from the same samples, so that gradients of what is not cut are the same on
each of them: a gather's gradient is this process's slice, and only inputs of cut layers need a sum over the group.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hpc_trainer.placement.base import Placed, Placement, group_place

LAYERS = (nn.Linear, _ConvNd)
CHANNELWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample),
)


@dataclass(frozen=True)
class Slice:
    """Of a whole tensor of ``extent`` along ``axis``: this process's entries, as evenly cut as it goes."""

    axis: int
    extent: int
    group: ProcessGroup

    @property
    def bounds(self) -> list[int]:
        parts = dist.get_world_size(self.group)
        return [self.extent * r // parts for r in range(parts + 1)]

    @property
    def mine(self) -> tuple[int, int]:
        bounds, rank = self.bounds, dist.get_rank(self.group)
        return bounds[rank], bounds[rank + 1]

    def of(self, whole: Tensor) -> Tensor:
        low, high = self.mine
        return whole.narrow(self.axis, low, high - low)

    def joined(self, part: Tensor) -> Tensor:
        """The whole of which each process gives its part; collective."""
        bounds = self.bounds
        sizes = [b - a for a, b in itertools.pairwise(bounds)]
        padded = part.new_zeros((max(sizes), *part.movedim(self.axis, 0).shape[1:]))
        padded[: part.shape[self.axis]] = part.movedim(self.axis, 0)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)]).movedim(0, self.axis).contiguous()


class _Into(torch.autograd.Function):
    """The input of a cut layer: every process's gradient is a part of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """The output of a layer whose inputs are cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Slice) -> Tensor:
        ctx.cut = cut
        return cut.joined(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.cut.of(gradients[0]).contiguous(), None


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    made = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(made, group=group)
    return made


@dataclass(frozen=True)
class Plan:
    """pairs: (layer, channel-wise layers, layer) without a gather between them; columns: layers of which outputs are gathered."""

    pairs: list[tuple[Any, list[nn.Module], Any]]
    columns: list[Any]

    @classmethod
    def of(cls, model: nn.Module, size: int) -> Plan:
        """Every linear layer and convolution that has a channel (and group of channels) for each of ``size`` processes."""
        pairs, paired = [], set()
        for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
            for first, between, second in _pairs(sequence, size):
                if first not in paired and second not in paired:
                    paired |= {first, second}
                    pairs.append((first, between, second))
        layers = [m for m in model.modules() if isinstance(m, LAYERS) and m not in paired]
        return cls(pairs, [m for m in layers if _divides(m, size)])

    def cut_parameters(self) -> list[nn.Parameter]:
        found = [first.bias for first, _, _ in self.pairs] + [layer.bias for layer in self.columns]
        for first, between, second in self.pairs:
            found += [first.weight, second.weight, *(p for layer in between for p in layer.parameters(recurse=False))]
        return [p for p in [*found, *(layer.weight for layer in self.columns)] if p is not None]


def split_channels(model: nn.Module, group: ProcessGroup) -> nn.Module:
    """Cuts what ``Plan`` says, in place."""
    plan = Plan.of(model, dist.get_world_size(group))
    for first, between, second in plan.pairs:
        _pair(first, between, second, group)
    for layer in plan.columns:
        _column(layer, group)
    return model


def cut_of(tensor: Tensor) -> Slice | None:
    """How a parameter or buffer is cut; None: whole on every process."""
    return getattr(tensor, "channels", None)


def _output_axis(layer: nn.Module) -> int:
    """Of the weight: the axis of output channels."""
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _shrink(module: nn.Module, name: str, cut: Slice) -> None:
    """A parameter or buffer becomes its slice, and knows it."""
    whole = getattr(module, name)
    if whole is None:
        return
    part: Tensor = cut.of(whole.detach()).clone(memory_format=torch.contiguous_format)
    if isinstance(whole, nn.Parameter):
        part = nn.Parameter(part, requires_grad=whole.requires_grad)
    part.channels = cut  # type: ignore[attr-defined]
    setattr(module, name, part)


def _divides(layer: Any, size: int) -> bool:
    groups = getattr(layer, "groups", 1)
    return _outputs(layer) >= size and (groups == 1 or groups % size == 0)


def _column(layer: Any, group: ProcessGroup) -> None:
    """Output channels cut, gathered after the layer. A grouped convolution is cut between its groups."""
    size, groups = dist.get_world_size(group), getattr(layer, "groups", 1)
    inputs: Slice | None = None
    if groups > 1:
        inputs = Slice(1, layer.in_channels, group)
        layer.groups = groups // size
        # the weight of a transposed convolution has its input channels first, which are cut with the groups
        _shrink(layer, "weight", Slice(0, layer.weight.shape[0], group))
    else:
        _shrink(layer, "weight", Slice(_output_axis(layer), _outputs(layer), group))
    _shrink(layer, "bias", Slice(0, _outputs(layer), group))
    found = Slice(-1 if isinstance(layer, nn.Linear) else 1, _outputs(layer), group)
    layer.forward = functools.partial(_gathered, layer.forward, inputs, found)


def _gathered(forward: Callable[..., Tensor], inputs: Slice | None, outputs: Slice, x: Tensor, *rest: Any) -> Tensor:
    entered: Tensor = _Into.apply(x, outputs.group)
    made: Tensor = _Gather.apply(forward(entered if inputs is None else inputs.of(entered), *rest), outputs)
    return made


def _pairs(sequence: nn.Sequential, size: int) -> Iterator[tuple[Any, list[nn.Module], Any]]:
    """(layer, channel-wise layers, layer) that follow each other, whose channels between them divide evenly."""
    children = list(sequence)
    at = [n for n, child in enumerate(children) if isinstance(child, LAYERS)]
    for a, b in itertools.pairwise(at):
        first, second, between = children[a], children[b], children[a + 1 : b]
        alike = isinstance(first, nn.Linear) == isinstance(second, nn.Linear)
        whole_groups = all(getattr(layer, "groups", 1) == 1 for layer in (first, second))
        even = _outputs(first) % size == 0
        if alike and whole_groups and even and all(_cuttable(layer, _outputs(first), size) for layer in between):
            yield first, between, second


def _cuttable(layer: nn.Module, channels: int, size: int) -> bool:
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups % size == 0
    return isinstance(layer, (*CHANNELWISE, _BatchNorm)) and getattr(layer, "num_features", channels) == channels


def _pair(first: Any, between: list[nn.Module], second: Any, group: ProcessGroup) -> None:
    channels, size = _outputs(first), dist.get_world_size(group)
    _shrink(first, "weight", Slice(_output_axis(first), channels, group))
    _shrink(first, "bias", Slice(0, channels, group))
    first.forward = functools.partial(_entered, first.forward, group)
    for layer in between:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name, None) is not None:
                _shrink(layer, name, Slice(0, channels, group))
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups, layer.num_channels = layer.num_groups // size, channels // size
        elif isinstance(layer, _BatchNorm):
            layer.num_features = channels // size
    _shrink(second, "weight", Slice(1 - _output_axis(second), channels, group))
    second.forward = functools.partial(_added, second, second.forward, group)


def _entered(forward: Callable[..., Tensor], group: ProcessGroup, x: Tensor, *rest: Any) -> Tensor:
    made: Tensor = forward(_Into.apply(x, group), *rest)
    return made


def _added(layer: Any, forward: Callable[..., Tensor], group: ProcessGroup, x: Tensor, *rest: Any) -> Tensor:
    """The bias is whole on every process: added once, after the sum."""
    bias, layer._parameters["bias"] = layer.bias, None
    try:
        made: Tensor = _Sum.apply(forward(x, *rest), group)
    finally:
        layer._parameters["bias"] = bias
    if bias is None:
        return made
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *(1,) * (layer.weight.dim() - 2))
    biased: Tensor = made + bias.view(shape)
    return biased


class Channelled(Placement):
    """Layers cut over ``tensor``; whole along the dimensions of samples, where gradients are summed as ever."""

    def _wrapped(self) -> nn.Module:
        assert self.layout.tensor is not None
        split_channels(self.model, self.layout.tensor)
        return super()._wrapped()

    def whole(self, tensor: Tensor, parameter: Tensor) -> npt.NDArray[Any]:
        cut = cut_of(parameter)
        return super().whole(tensor if cut is None else cut.joined(tensor.detach()), parameter)

    def placed(self, tensor: Tensor, parameter: Tensor | None) -> Placed:
        cut = None if parameter is None else cut_of(parameter)
        if cut is None or parameter is None or tensor.shape != parameter.shape:
            return super().placed(tensor, parameter)
        shape, offset = list(tensor.shape), [0] * tensor.dim()
        shape[cut.axis], offset[cut.axis] = cut.extent, cut.mine[0]
        copy, copies = group_place(self.layout.summed)
        return Placed(shape=tuple(shape), offset=tuple(offset), copy=copy, copies=copies)

    def clip(self, norm: float) -> None:
        """Slices count on every process of the group, whole parameters once."""
        grads = [(p, p.grad) for p in self.parameters() if p.grad is not None]
        sliced = [g for p, g in grads if cut_of(p) is not None]
        rest = [g for p, g in grads if cut_of(p) is None]
        squares = nn.utils.get_total_norm(sliced) ** 2 if sliced else grads[0][1].new_zeros(())
        dist.all_reduce(squares, group=self.layout.tensor)
        total = (squares + (nn.utils.get_total_norm(rest) ** 2 if rest else 0)).sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters(), norm, total)
