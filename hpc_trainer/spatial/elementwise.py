"""Functions that treat each element, or each fibre along an axis that is not cut, on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_iter, tree_map

from hpc_trainer.spatial.part import BY_NAME, Part, handles, local, matched, name_of, position, refuse, wrap

POINTWISE = """
abs add bitwise_and bitwise_not bitwise_or bitwise_xor bool celu clamp clamp_min clamp_max clone contiguous cos cpu detach div
double elu eq erf exp expm1 floor float ge gelu gt half hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu le lerp
log log10 log1p log2 logical_and logical_not logical_or logical_xor logsigmoid lt maximum minimum mish mul multiply ne neg
negative pow nan_to_num reciprocal relu relu6 round rsqrt rsub selu sigmoid sign silu sin softplus softsign sqrt
square sub subtract tanh threshold to true_divide trunc type type_as where xlogy zeros_like ones_like full_like empty_like
int long addcmul addcdiv
__and__ __or__ __xor__ __invert__ __rsub__ __rdiv__ __rtruediv__ __rpow__ __radd__ __rmul__ __pow__ __truediv__ __sub__
__add__ __mul__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __iadd__ __isub__ __imul__ __itruediv__
"""
IN_PLACE = """
add_ sub_ mul_ div_ clamp_ clamp_min_ clamp_max_ relu_ sigmoid_ tanh_ exp_ sqrt_ neg_ leaky_relu_ elu_ hardtanh_ zero_ fill_
masked_fill_ copy_ lerp_ celu_ selu_ hardswish_ silu_
"""
LOSSES = (
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
)


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    like = next(v for v in tree_iter((args, kwargs)) if isinstance(v, Part))
    if kwargs.get(
        "inplace"
    ):  # the result is what the caller goes on with; in place, a hook of FSDP on it would be lost
        kwargs = {**kwargs, "inplace": False}
    args, kwargs = (tree_map(lambda v: matched(v, like), part) for part in (args, kwargs))
    return wrap(func(*args, **kwargs), like.placed)


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    target = args[0]
    if not isinstance(target, Part):
        refuse(f"{name_of(func)} of a cut tensor into a whole one")
    rest, named = (tree_map(lambda v: matched(v, target), part) for part in (args[1:], kwargs))
    func(local(target), *rest, **named)
    return target


BY_NAME.update(dict.fromkeys(POINTWISE.split(), _pointwise))
BY_NAME.update(dict.fromkeys(IN_PLACE.split(), _in_place))


@handles(*LOSSES)
def _loss(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Element-wise first, then what ``reduction`` says over the whole."""
    named = {k: v for k, v in kwargs.items() if v is not None}
    if len(args) > 2 or named.keys() & {"size_average", "reduce"}:
        refuse(f"{name_of(func)} with positional or outdated options")
    reduction = named.pop("reduction", "mean")
    return _reduced(_pointwise(func, args, {**named, "reduction": "none"}), reduction)


def _reduced(found: Any, reduction: str) -> Tensor:
    made: Tensor = found if reduction == "none" else found.sum() if reduction == "sum" else found.mean()
    return made


@handles(functional.cross_entropy)
def _cross_entropy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """(N, K, ...) logits against (N, ...) class numbers, whole or cut."""

    def read(
        input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
        reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Any:  # fmt: skip
        if size_average is not None or reduce is not None:
            refuse("cross_entropy with outdated options")
        return input, target, weight, ignore_index, reduction, label_smoothing

    x, target, weight, ignored, reduction, smoothing = read(*args, **kwargs)
    if not isinstance(x, Part) or position(x) < 2:
        refuse("cross_entropy of whole logits against cut targets")
    if reduction == "mean" and (weight is not None or bool((matched(target, x) == ignored).any())):
        refuse("cross_entropy with reduction='mean', weights or ignored targets")
    found = func(
        local(x), matched(target, x), weight, ignore_index=ignored, reduction="none", label_smoothing=smoothing
    )
    return _reduced(wrap(found, x.placed), reduction)


@handles(
    torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax, functional.softmax, functional.log_softmax
)
def _along(func: Any, args: Any, kwargs: Any) -> Any:
    """softmax(x, dim) along an axis that is not cut."""
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is None or dim % x.dim() == position(x):
        refuse(f"{name_of(func)} along the cut axis")
    return wrap(func(local(x), *args[1:], **kwargs), x.placed)


@handles(functional.linear)
def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if (
        not isinstance(x, Part)
        or x.placed.axis == -1
        or any(isinstance(v, Part) for v in tree_iter((args[1:], kwargs)))
    ):
        refuse("a linear layer along the cut axis")
    return wrap(func(local(x), *args[1:], **kwargs), x.placed)


@handles(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    if training and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) > 0:
        refuse(
            f"{name_of(func)}, which draws random numbers by process (hpc_trainer.dropout.key_dropout replaces layers),"
        )
    return args[0]


@handles(functional.prelu, torch.prelu)
def _prelu(func: Any, args: Any, kwargs: Any) -> Any:
    return wrap(func(local(args[0]), *args[1:], **kwargs), args[0].placed)
