"""The plain cross-entropy of K clients at once, with its gradient, in a few operations.

Mapped over clients and differentiated by autograd, this loss costs more than the rest of a small model's step. So an
application's loss is watched once for each shape; where it is nothing but ``cross_entropy`` it is computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from simulations.engine import native

PLAIN = {"weight": None, "size_average": None, "ignore_index": -100, "reduce": None, "label_smoothing": 0.0}
CASTS = (Tensor.to, Tensor.long)
CONSTANTS = (Tensor.new_tensor, Tensor.new_full, Tensor.new_ones, torch.tensor, torch.full, torch.ones)
SHAPES = (Tensor.__len__, Tensor.size, Tensor.dim, Tensor.numel)
PROPERTIES = tuple(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim"))


class _Watch(TorchFunctionMode):
    """``plain`` stays true while a loss does nothing with its tensors but ask for their shapes and for their cross-entropy."""

    def __init__(self, outputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.plain, self._outputs, self._targets = True, outputs, [targets]
        self._each: list[Tensor] = []  # losses of examples
        self.sums: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func is functional.cross_entropy:
            self._entropy(found, *args, **kwargs)
        elif func is Tensor.sum and len(args) == 1 and not kwargs and _among(args[0], self._each):
            self.sums.append(found)
        elif func in CASTS and _among(args[0], self._targets) and found.dtype == torch.int64:
            self._targets.append(found)
        elif func in CONSTANTS:
            self.plain &= not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
        elif func not in SHAPES and func not in PROPERTIES:
            self.plain = False
        return found

    def _entropy(
        self, found: Tensor, input: Any = None, target: Any = None, *rest: Any, reduction: str = "mean", **settings: Any
    ) -> None:
        usual = all(key in PLAIN and value == PLAIN[key] for key, value in settings.items())
        self.plain &= input is self._outputs and _among(target, self._targets) and not rest and usual
        if reduction in ("none", "sum"):
            (self._each if reduction == "none" else self.sums).append(found)


def _among(tensor: Any, others: list[Tensor]) -> bool:
    return any(tensor is other for other in others)


def plain_cross_entropy(loss: Callable[..., Any], outputs: Tensor, targets: Tensor, config: Any) -> float:
    """The denominator where loss(outputs, targets, config) is the summed cross-entropy over a number that only shapes
    decide; 0 where it is anything else. outputs: (B, C) of one client; targets: (B,).
    """
    if outputs.dim() != 2 or targets.dim() != 1 or targets.dtype.is_floating_point or not outputs.is_floating_point():
        return 0.0
    with _Watch(outputs, targets) as watch:
        numerator, denominator = loss(outputs, targets, config)
    return float(denominator) if watch.plain and _among(numerator, watch.sums) else 0.0


def cross_entropy(outputs: Tensor, targets: Tensor, denominator: float) -> tuple[Tensor, Tensor]:
    """outputs: (K, B, C); targets: (K, B) class numbers. Returns the sums (K,) and the gradient of sum / denominator."""
    if native.usable(outputs) and targets.device.type == "cpu":
        return native.cross_entropy(outputs.contiguous(), targets.long().contiguous(), 1.0 / denominator)
    index = targets.long().unsqueeze(2)
    logarithms = torch.log_softmax(outputs, 2)
    sums = logarithms.gather(2, index).sum((1, 2)).neg_()
    gradient = logarithms.exp_()
    gradient.scatter_add_(2, index, gradient.new_full((1, 1, 1), -1.0).expand(index.shape))
    return sums, gradient.mul_(1.0 / denominator)
