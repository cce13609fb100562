"""Shape, views and joins of cut tensors: the cut axis is followed; what would cut it anew is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpc_trainer.spatial.part import Part, handles, local, matched, name_of, position, refuse, whole_shape, wrap

# facts that are the same for the part and the whole


def _fact(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


PROPERTIES = (
    "dtype device ndim requires_grad grad_fn is_leaf layout is_cuda is_meta is_sparse is_quantized is_nested _version"
)
handles(*(getattr(Tensor, name).__get__ for name in PROPERTIES.split()))(_fact)
handles(
    *(Tensor.dim, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    *(Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty),
    *(Tensor.get_device, Tensor.element_size, Tensor.data_ptr, Tensor.register_hook, Tensor.__hash__),
)(_fact)


@handles(getattr(Tensor, "_base").__get__)  # noqa: B009
def _base(func: Any, args: Any, kwargs: Any) -> None:
    """FSDP warns of views that it is given; a part is one of its own rows only."""


@handles(Tensor.shape.__get__)  # type: ignore[attr-defined]
def _shape(func: Any, args: Any, kwargs: Any) -> torch.Size:
    return whole_shape(args[0])


@handles(Tensor.size)
def _size(func: Any, args: Any, kwargs: Any) -> Any:
    shape = whole_shape(args[0])
    rest = [*args[1:], *kwargs.values()]
    return shape if not rest or rest[0] is None else shape[rest[0]]


@handles(Tensor.numel, torch.numel, Tensor.nelement)
def _numel(func: Any, args: Any, kwargs: Any) -> int:
    return math.prod(whole_shape(args[0]))


@handles(Tensor.__len__)
def _length(func: Any, args: Any, kwargs: Any) -> int:
    return whole_shape(args[0])[0]


@handles(Tensor.requires_grad_)
def _requires(func: Any, args: Any, kwargs: Any) -> Part:
    x: Part = args[0]
    with torch._C.DisableTorchFunctionSubclass():
        func(x, *args[1:], **kwargs)
    return x


# order of the axes


def _at(x: Part, made: Tensor, place: int) -> Part:
    return wrap(made, x.placed.at(place - made.dim()))


@handles(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes)
def _transpose(func: Any, args: Any, kwargs: Any) -> Part:
    x, (a, b) = args[0], (args[1] % args[0].dim(), args[2] % args[0].dim())
    order = list(range(x.dim()))
    order[a], order[b] = order[b], order[a]
    return _at(x, local(x).permute(order), order.index(position(x)))


@handles(torch.permute, Tensor.permute)
def _permute(func: Any, args: Any, kwargs: Any) -> Part:
    x, dims = args[0], args[1:] or (kwargs["dims"],)
    order = [d % x.dim() for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    return _at(x, local(x).permute(order), order.index(position(x)))


@handles(torch.movedim, Tensor.movedim)
def _movedim(func: Any, args: Any, kwargs: Any) -> Part:
    x = args[0]
    order = torch.movedim(torch.empty([n + 1 for n in range(x.dim())], device="meta"), *args[1:], **kwargs).shape
    return _at(x, local(x).movedim(*args[1:], **kwargs), [n - 1 for n in order].index(position(x)))


@handles(torch.squeeze, Tensor.squeeze)
def _squeeze(func: Any, args: Any, kwargs: Any) -> Part:
    x, dims = args[0], [*args[1:], *kwargs.values()]
    shape = whole_shape(x)
    chosen = (
        range(x.dim())
        if not dims
        else [d % x.dim() for d in (dims[0] if isinstance(dims[0], (tuple, list)) else [dims[0]])]
    )
    gone = [d for d in chosen if shape[d] == 1]
    if position(x) in gone:
        refuse(f"{name_of(func)} of the cut axis")
    return _at(x, local(x).squeeze(gone), position(x) - sum(d < position(x) for d in gone)) if gone else x


@handles(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Part:
    x, dim = args[0], [*args[1:], *kwargs.values()][0]
    place = dim % (x.dim() + 1)
    return _at(x, local(x).unsqueeze(place), position(x) + (place <= position(x)))


@handles(torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten, Tensor.unflatten)
def _reshape(func: Any, args: Any, kwargs: Any) -> Part:
    """The cut axis must stay an axis of its own, with as many elements behind it."""
    x, rest = args[0], args[1:]
    shape, place = whole_shape(x), position(x)
    if func.__name__ == "view" and (isinstance(rest[0], torch.dtype) if rest else True):
        refuse("view as another type")
    target = list(func(torch.empty(shape, device="meta"), *rest, **kwargs).shape)
    behind = math.prod(shape[place + 1 :])
    same = [a for a, n in enumerate(target) if n == shape[place] and math.prod(target[a + 1 :]) == behind]
    if not same:
        refuse(f"{name_of(func)} from {tuple(shape)} to {tuple(target)} merges or cuts axis {place}")
    low, high = x.placed.mine
    target[same[0]] = high - low
    return _at(x, local(x).reshape(target), same[0])


@handles(Tensor.view_as)
def _view_as(func: Any, args: Any, kwargs: Any) -> Part:
    """What autograd functions call on inputs that they hand through (FSDP's)."""
    x, like = args
    if not isinstance(x, Part) or not isinstance(like, Part) or x.placed != like.placed or x.shape != like.shape:
        refuse("view_as of another shape")
    return wrap(local(x).view_as(local(like)), x.placed)


@handles(Tensor.expand)
def _expand(func: Any, args: Any, kwargs: Any) -> Part:
    x = args[0]
    sizes = list(args[1] if isinstance(args[1], (tuple, list)) else args[1:])
    place = len(sizes) + x.placed.axis
    if sizes[place] not in (-1, x.placed.extent):
        refuse(f"{name_of(func)} of the cut axis")
    sizes[place] = -1
    return wrap(local(x).expand(*sizes), x.placed)


# joins and selections


@handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func: Any, args: Any, kwargs: Any) -> Part:
    def read(tensors: Sequence[Tensor], dim: int = 0) -> Any:
        return tensors, dim

    tensors, dim = read(*args, **kwargs)
    like = next(t for t in tensors if isinstance(t, Part))
    if dim % like.dim() == position(like):
        refuse("cat along the cut axis")
    return wrap(torch.cat([matched(t, like) for t in tensors], dim), like.placed)


@handles(torch.stack)
def _stack(func: Any, args: Any, kwargs: Any) -> Part:
    def read(tensors: Sequence[Tensor], dim: int = 0) -> Any:
        return tensors, dim

    tensors, dim = read(*args, **kwargs)
    like = next(t for t in tensors if isinstance(t, Part))
    place = dim % (like.dim() + 1)
    made = torch.stack([matched(t, like) for t in tensors], place)
    return _at(like, made, position(like) + (place <= position(like)))


@handles(torch.split, Tensor.split, torch.chunk, Tensor.chunk, torch.unbind, Tensor.unbind)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    where = 1 if func.__name__ == "unbind" else 2
    dim = (args[where] if len(args) > where else kwargs.get("dim", 0)) % x.dim()
    if dim == position(x):
        refuse(f"{name_of(func)} along the cut axis")
    gone = func.__name__ == "unbind" and dim > position(x)
    split = x.placed.at(x.placed.axis + gone)
    return tuple(wrap(part, split) for part in func(local(x), *args[1:], **kwargs))


@handles(Tensor.narrow, torch.narrow)
def _narrow(func: Any, args: Any, kwargs: Any) -> Part:
    def read(input: Part, dim: int, start: int, length: int) -> Any:
        return input, dim, start, length

    x, dim, start, length = read(*args, **kwargs)
    made: Part = x[(*(slice(None),) * (dim % x.dim()), slice(start, start + length))]
    return made


@handles(Tensor.__getitem__)
def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """By integers, slices, None and Ellipsis; of the cut axis only a range. A table may be indexed by a cut tensor."""
    x, index = args
    if not isinstance(x, Part):
        if isinstance(index, Part):
            return wrap(x[local(index)], index.placed.at(index.placed.axis - (x.dim() - 1)))
        refuse("indexing a whole tensor by several, of which one is cut")
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) or isinstance(i, bool) for i in parts):
        refuse("indexing by tensors or lists")
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        lacking = x.dim() - sum(i is not None and i is not Ellipsis for i in parts)
        parts[at : at + 1] = [slice(None)] * lacking
    parts += [slice(None)] * (x.dim() - sum(i is not None for i in parts))
    axis, place, bounds = 0, 0, x.placed.bounds
    for number, i in enumerate(parts):
        if i is None:
            place += axis <= position(x)
            continue
        if axis == position(x):
            if isinstance(i, int):  # one row, which all processes need: the sum of it and of nothing
                at = i % x.placed.extent
                one: Any = x[(*parts[:number], slice(at, at + 1), *parts[number + 1 :])]
                return one.sum(position(one))
            if i.step not in (None, 1):
                refuse("every so many rows of the cut axis")
            first, last, _ = i.indices(x.placed.extent)
            last = max(first, last)
            low, high = x.placed.mine
            bounds = tuple(min(max(b, first), last) - first for b in bounds)
            begin = min(max(first, low), high) - low
            parts[number] = slice(begin, max(begin, min(last, high) - low))
        elif axis < position(x):
            place += not isinstance(i, int)
        axis += 1
    made = local(x)[tuple(parts)]
    return wrap(made, x.placed.at(place - made.dim(), bounds))


@handles(torch.nn.functional.pad)
def _pad(func: Any, args: Any, kwargs: Any) -> Part:
    """Constant padding; the first and the last process hold what is added along the cut axis."""

    def read(input: Part, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
        return input, list(pad), mode, value

    x, pad, mode, value = read(*args, **kwargs)
    at = 2 * (x.dim() - 1 - position(x))
    before, after = pad[at : at + 2] if at < len(pad) else (0, 0)
    if (mode != "constant" and (before or after)) or before < 0 or after < 0:
        refuse(f"{name_of(func)} by {mode} or by negative amounts along the cut axis")
    parts = len(x.placed.bounds) - 1
    bounds = [0, *(b + before for b in x.placed.bounds[1:-1]), x.placed.extent + before + after]
    if at < len(pad):
        pad[at : at + 2] = [before if x.placed.rank == 0 else 0, after if x.placed.rank == parts - 1 else 0]
    return wrap(func(local(x), pad, mode, value), x.placed.at(x.placed.axis, bounds))
