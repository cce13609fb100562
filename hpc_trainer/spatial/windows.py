"""Convolutions and pooling on cut tensors: each process fetches the rows that its windows reach (halo exchange).

A window function with kernel k, stride s, dilation d and padding p reads rows o s - p .. o s - p + d (k - 1) for its output
row o. Each process computes the outputs that belong to its rows; any cut, uneven or with processes without rows, is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from hpc_trainer.spatial.exchange import Range, Split, rows
from hpc_trainer.spatial.part import Part, handles, local, name_of, position, refuse, whole_shape, wrap


def _each(value: Any, dims: int) -> list[int]:
    return (
        [int(value)] * dims
        if isinstance(value, int)
        else [int(v) for v in (value if len(value) > 1 else [*value] * dims)]
    )


def _spatial(x: Part, dims: int, func: Any) -> int:
    """Number of the cut axis among the ``dims`` last ones, which windows run over."""
    place = position(x) - (x.dim() - dims)
    if place < 0:
        refuse(f"{name_of(func)} over {dims} axes, of which none is the cut one: {x!r}")
    return place


def scaled_bounds(split: Split, stride: int, outputs: int) -> list[int]:
    """Where the outputs are cut: with the rows their windows begin near."""
    return [min(-(-b // stride), outputs) for b in split.bounds[:-1]] + [outputs]


def windowed(
    x: Part,
    compute: Callable[[Tensor], Tensor],
    *,
    kernel: int,
    stride: int,
    dilation: int,
    before: int,
    after: int,
    fill: float = 0.0,
) -> Part:
    """``compute`` on rows that are already padded along the cut axis.

    A process without outputs computes one from filled rows and drops it, so that its parameters have their (zero) gradients.
    """
    span = dilation * (kernel - 1) + 1
    outputs = (x.placed.extent + before + after - span) // stride + 1
    if outputs < 1:
        refuse(f"a window of {span} rows over {x.placed.extent}")
    split = x.placed.at(x.placed.axis, scaled_bounds(x.placed, stride, outputs))
    wanted: list[Range] = []
    for first, last in split.ranges:
        if last == first:
            wanted.append((-span, 0))
        else:
            wanted.append((first * stride - before, (last - 1) * stride - before + span))
    own = local(x)
    fetched = rows(own, x.placed, wanted, fill)
    with _kept_in_pieces(own, fetched, x.placed.mine[0] - wanted[split.rank][0], position(x)):
        made = compute(fetched)
    low, high = split.mine
    return wrap(made.narrow(position(x), 0, high - low), split)


_recomputed = False


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Around a forward pass whose activations are computed again in the backward pass: nothing is kept here."""
    global _recomputed
    before, _recomputed = _recomputed, True
    try:
        yield
    finally:
        _recomputed = before


def _kept_in_pieces(own: Tensor, fetched: Tensor, offset: int, axis: int) -> AbstractContextManager[object]:
    """Until the backward pass a layer keeps the fetched rows and shares its own ones with whoever keeps them too.

    The fetched tensor is a copy of both, and would be a second copy of every activation. offset: of the own rows in it.
    """
    low, high = max(0, offset), min(fetched.shape[axis], offset + own.shape[axis])
    if fetched is own or high <= low or _recomputed or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    before = fetched.detach().narrow(axis, 0, low).clone()
    after = fetched.detach().narrow(axis, high, fetched.shape[axis] - high).clone()
    inner = own.detach().narrow(axis, low - offset, high - low)
    place, shape, version = fetched.data_ptr(), fetched.shape, own._version

    def pack(tensor: Tensor) -> Any:
        return None if tensor.data_ptr() == place and tensor.shape == shape else tensor

    def unpack(kept: Any) -> Any:
        if kept is not None:
            return kept
        if own._version != version:
            raise RuntimeError("a layer's input was changed in place before the backward pass")
        return torch.cat([before, inner, after], axis)

    return saved_tensors_hooks(pack, unpack)


@handles(torch.conv1d, torch.conv2d, torch.conv3d, functional.conv1d, functional.conv2d, functional.conv3d)
def _convolution(func: Any, args: Any, kwargs: Any) -> Part:
    def read(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        return input, weight, bias, stride, padding, dilation, groups

    x, weight, bias, stride, padding, dilation, groups = read(*args, **kwargs)
    if not isinstance(x, Part) or isinstance(weight, Part):
        refuse(f"{name_of(func)} with a cut weight")
    dims = weight.dim() - 2
    axis = _spatial(x, dims, func)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    if isinstance(padding, str):
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _each(padding, dims)]
    others = list(sides)
    others[axis] = (0, 0)

    def compute(padded: Tensor) -> Tensor:
        uneven = any(a != b for a, b in others)
        if uneven:
            padded = functional.pad(padded, [n for side in reversed(others) for n in side])
        paddings = [0] * dims if uneven else [a for a, _ in others]
        made: Tensor = func(padded, weight, bias, strides, paddings, dilations, groups)
        return made

    return windowed(
        x, compute, kernel=weight.shape[2 + axis], stride=strides[axis], dilation=dilations[axis],
        before=sides[axis][0], after=sides[axis][1],
    )  # fmt: skip


@handles(
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d,
)  # fmt: skip
def _transposed(func: Any, args: Any, kwargs: Any) -> Part:
    """Output row j gets from input rows i with j = i s - p + d k."""

    def read(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        return input, weight, bias, stride, padding, output_padding, groups, dilation

    x, weight, bias, stride, padding, extra, groups, dilation = read(*args, **kwargs)
    if not isinstance(x, Part) or isinstance(weight, Part):
        refuse(f"{name_of(func)} with a cut weight")
    dims = weight.dim() - 2
    axis = _spatial(x, dims, func)
    strides, paddings, extras, dilations = (_each(v, dims) for v in (stride, padding, extra, dilation))
    s, p, reach = strides[axis], paddings[axis], dilations[axis] * (weight.shape[2 + axis] - 1)
    outputs = (x.placed.extent - 1) * s - 2 * p + reach + extras[axis] + 1
    split = x.placed.at(x.placed.axis, [min(b * s, outputs) for b in x.placed.bounds[:-1]] + [outputs])
    wanted: list[Range] = []
    for first, last in split.ranges:
        low, high = -((reach - first - p) // s), (last - 1 + p) // s + 1
        low, high = max(low, 0), min(high, x.placed.extent)
        wanted.append((low, high) if last > first and high > low else (-1, 0))
    first, last = split.mine
    paddings[axis] = extras[axis] = 0
    made = func(rows(local(x), x.placed, wanted), weight, None, strides, paddings, extras, groups, dilations)
    offset = wanted[split.rank][0] * s  # the whole output's row p + j is row p + j - offset here
    place = position(x)
    if last > first:
        made = _window(made, place, first + p - offset, last + p - offset)
    else:
        made = made.narrow(place, 0, 0)
    if bias is not None:
        made = made + bias.view(-1, *(1,) * dims)
    return wrap(made, split)


def _window(x: Tensor, axis: int, low: int, high: int) -> Tensor:
    """Rows low .. high - 1; zeros outside of what is there."""
    lacking = max(0, -low), max(0, high - x.shape[axis])
    if any(lacking):
        x = functional.pad(x, [0, 0] * (x.dim() - axis - 1) + [*lacking])
    return x.narrow(axis, low + lacking[0], high - low)


@handles(
    functional.max_pool1d,
    functional.max_pool2d,
    functional.max_pool3d,
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
)
def _max_pool(func: Any, args: Any, kwargs: Any) -> Part:
    def read(
        input: Part,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if ceil_mode or return_indices:
            refuse(f"{name_of(func)} with ceil_mode or return_indices")
        return input, kernel_size, kernel_size if stride is None or stride == [] else stride, padding, dilation

    x, kernel, stride, padding, dilation = read(*args, **kwargs)
    dims = int(func.__name__[-2])
    axis = _spatial(x, dims, func)
    kernels, strides, paddings, dilations = (_each(v, dims) for v in (kernel, stride, padding, dilation))
    p, paddings[axis] = paddings[axis], 0
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    return windowed(
        x, lambda padded: func(padded, kernels, strides, paddings, dilations),
        kernel=kernels[axis], stride=strides[axis], dilation=dilations[axis], before=p, after=p, fill=lowest,
    )  # fmt: skip


@handles(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
def _average_pool(func: Any, args: Any, kwargs: Any) -> Part:
    def read(
        input: Part,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Any:
        if ceil_mode or divisor_override or (not count_include_pad and any(_each(padding, 1))):
            refuse(f"{name_of(func)} with ceil_mode, divisor_override or count_include_pad=False")
        return input, kernel_size, kernel_size if stride is None or stride == [] else stride, padding

    x, kernel, stride, padding = read(*args, **kwargs)
    dims = int(func.__name__[-2])
    axis = _spatial(x, dims, func)
    kernels, strides, paddings = (_each(v, dims) for v in (kernel, stride, padding))
    p, paddings[axis] = paddings[axis], 0
    return windowed(
        x, lambda padded: func(padded, kernels, strides, paddings),
        kernel=kernels[axis], stride=strides[axis], dilation=1, before=p, after=p,
    )  # fmt: skip


@handles(functional.interpolate)
def _interpolate(func: Any, args: Any, kwargs: Any) -> Part:
    """The other axes by torch, the cut one by its own weights: these kinds of interpolation are separable."""

    def read(
        input: Part, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None,
        recompute_scale_factor: Any = None, antialias: bool = False,
    ) -> Any:  # fmt: skip
        if mode not in ("nearest", "linear", "bilinear", "trilinear") or antialias:
            refuse(f"interpolation by {mode}{' with antialias' if antialias else ''}")
        return input, size, scale_factor, mode, bool(align_corners), bool(recompute_scale_factor)

    x, size, factor, mode, corners, recompute = read(*args, **kwargs)
    dims = x.dim() - 2
    axis = _spatial(x, dims, func)
    shape = whole_shape(x)[2:]
    if size is not None:
        sizes, scales = _each(size, dims), [0.0] * dims
    else:
        factors = [float(f) for f in (factor if isinstance(factor, (tuple, list)) else [factor] * dims)]
        sizes = [int(n * f) for n, f in zip(shape, factors, strict=True)]
        scales = [0.0 if recompute else f for f in factors]
    extent, outputs = shape[axis], sizes[axis]
    first, second, share = _sources(extent, outputs, scales[axis], mode, corners)
    split = x.placed.at(
        x.placed.axis, [min(-(-b * outputs // extent), outputs) for b in x.placed.bounds[:-1]] + [outputs]
    )
    wanted: list[Range] = [
        (int(first[a:b].min()), int(second[a:b].max()) + 1) if b > a else (0, 0) for a, b in split.ranges
    ]
    fetched = rows(local(x), x.placed, wanted)
    low, high = split.mine
    place, offset = position(x), wanted[split.rank][0]
    device = fetched.device
    made = fetched.index_select(place, (first[low:high] - offset).to(device))
    if mode != "nearest":
        weight = share[low:high].to(device, fetched.dtype).view(-1, *(1,) * (x.dim() - place - 1))
        made = made * (1 - weight) + fetched.index_select(place, (second[low:high] - offset).to(device)) * weight
    others = list(sizes)
    others[axis] = high - low
    if others != list(made.shape[2:]) and made.numel():
        given = [1.0 if n == axis else s for n, s in enumerate(scales)]
        how: dict[str, Any] = {"size": others} if not all(given) else {"scale_factor": given}
        made = functional.interpolate(made, mode=mode, align_corners=corners if mode != "nearest" else None, **how)
    elif others != list(made.shape[2:]):
        made = made.reshape(*made.shape[:2], *others)
    return wrap(made, split)


def _sources(extent: int, outputs: int, scale: float, mode: str, corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each output row: its two source rows and the share of the second."""
    out = torch.arange(outputs, dtype=torch.float64)
    step = 1 / scale if scale else extent / outputs
    if mode == "nearest":
        index = (out * step).floor().long().clamp(max=extent - 1)
        return index, index, torch.zeros_like(out)
    if corners:
        place = out * ((extent - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        place = ((out + 0.5) * step - 0.5).clamp(min=0)
    first = place.floor().long().clamp(max=extent - 1)
    return first, (first + 1).clamp(max=extent - 1), place - first


@handles(
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
    functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d,
)  # fmt: skip
def _adaptive_pool(func: Any, args: Any, kwargs: Any) -> Tensor:
    def read(input: Part, output_size: Any, return_indices: bool = False) -> Any:
        if return_indices:
            refuse(f"{name_of(func)} with return_indices")
        return input, output_size

    x, size = read(*args, **kwargs)
    dims = int(func.__name__[-2])
    _spatial(x, dims, func)
    if _each(size, dims) != [1] * dims:
        refuse(f"{name_of(func)} to {size}: only to one value a channel")
    axes = tuple(range(x.dim() - dims, x.dim()))
    made: Tensor = x.amax(dim=axes, keepdim=True) if "max" in func.__name__ else x.mean(dim=axes, keepdim=True)
    return made
