"""A tensor of which this process holds some rows, and which behaves like the whole.

``Part`` reports the whole tensor's shape, and every torch function called on it is computed so that the parts together
are what the function gives on the whole: rows come from other processes where a window reaches over an edge, sums go over
all processes. Functions that are not known to be right are refused by name, with the layer that called them: a cut tensor
never takes part in anything silently (DTensor's convolutions do, pytorch issue 186129).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fl_core.contracts.errors import ConfigError
from hpc_trainer.spatial.exchange import Range, Split, even_split, rows

Handler = Callable[..., Any]
BY_FUNCTION: dict[Any, Handler] = {}  # func -> handler(func, args, kwargs)
BY_NAME: dict[str, Handler] = {}
_layers: list[str] = []  # names of the modules whose forward pass is under way, the innermost last


class Part(Tensor):
    """Made by ``cut`` and ``wrap``; ``split`` says which rows are here."""

    placed: Split

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = BY_FUNCTION.get(func) or BY_NAME.get(getattr(func, "__name__", ""))
        if handler is None:
            refuse(f"{name_of(func)} is not known to be right")
        return handler(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Part(rows {self.placed.mine} of axis {self.placed.axis} of {tuple(self.shape)})"


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    owner = getattr(func, "__self__", None)
    return f"{getattr(owner, '__name__', 'Tensor')}.{name}" if name in ("__get__", "__set__") else str(name)


def refuse(what: str) -> NoReturn:
    """Names the layer under way."""
    where = f"layer {_layers[-1]!r}" if _layers and _layers[-1] else "the model or its loss"
    raise ConfigError(
        f"{where}: {what} on a volume that is cut over processes",
        remedy="train this model with pretrain.mesh = '' (data parallelism, FSDP), or replace the operation",
    )


def entered(name: str) -> None:
    _layers.append(name)


def left() -> None:
    del _layers[-1:]  # a hook before ours may have failed


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        BY_FUNCTION.update(dict.fromkeys(functions, handler))
        return handler

    return register


def local(x: Tensor) -> Tensor:
    """This process's rows as a plain tensor, in the same autograd graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def wrap(rows: Tensor, split: Split) -> Part:
    with torch._C.DisableTorchFunctionSubclass():
        made: Part = rows.as_subclass(Part)
        low, high = split.mine
        assert made.shape[split.axis] == high - low, (tuple(made.shape), split)
    made.placed = split
    return made


def cut(whole: Tensor, axis: int, group: Any) -> Part:
    """This process's even share of a whole tensor along ``axis`` (counted from the front)."""
    split = even_split(whole.shape[axis], axis - whole.dim(), group)
    low, high = split.mine
    return wrap(whole.narrow(axis, low, high - low), split)


def whole(x: Tensor) -> Tensor:
    """The whole tensor on every process."""
    if not isinstance(x, Part):
        return x
    everything: list[Range] = [(0, x.placed.extent)] * len(x.placed.ranges)
    return rows(local(x), x.placed, everything)


def moved(x: Part, bounds: tuple[int, ...]) -> Part:
    """The same tensor, cut elsewhere."""
    if bounds == x.placed.bounds:
        return x
    split = x.placed.at(x.placed.axis, bounds)
    return wrap(rows(local(x), x.placed, split.ranges), split)


def position(x: Part) -> int:
    """The cut axis, counted from the front."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.dim() + x.placed.axis


def whole_shape(x: Part) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        shape = list(x.shape)
    shape[x.placed.axis] = x.placed.extent
    return torch.Size(shape)


def matched(value: Any, like: Part) -> Any:
    """A value beside ``like`` in an element-wise operation, as plain rows of this process."""
    if isinstance(value, Part):
        if value.placed.axis != like.placed.axis or value.placed.extent != like.placed.extent:
            refuse(f"combining tensors cut along different axes or extents ({value!r} and {like!r})")
        return local(moved(value, like.placed.bounds))
    if isinstance(value, Tensor) and value.dim() >= -like.placed.axis:
        extent = value.shape[like.placed.axis]
        if extent == like.placed.extent and extent > 1:  # a whole tensor beside it: its rows here
            low, high = like.placed.mine
            return value.narrow(value.dim() + like.placed.axis, low, high - low)
        if extent != 1:
            refuse(f"combining a whole tensor of {tuple(value.shape)} with {like!r}")
    return value
