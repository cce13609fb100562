"""Parameters of K clients in one buffer (K, P), and what a backward pass does with a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_core.contracts.arrays import Arrays


@dataclass(frozen=True)
class Layout:
    """How a layer stores a parameter. order: permutation of its dimensions in memory; () = as it is."""

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.order) if self.order else self.shape

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(i) for i in range(len(self.order)))


class Slot:
    """One parameter: ``value`` (K, *stored). In a fused update a gradient goes straight into it, else into ``grad``."""

    def __init__(self, value: Tensor, grad: Tensor | None) -> None:
        self.value, self.grad = value, grad
        self.rate, self.keep = 0.0, 1.0

    def narrowed(self, clients: int) -> Slot:
        slot = Slot(self.value[:clients], None if self.grad is None else self.grad[:clients])
        slot.rate, slot.keep = self.rate, self.keep
        return slot

    def of(self, client: int) -> Slot:
        """That of one client alone."""
        slot = Slot(self.value[client : client + 1], None if self.grad is None else self.grad[client : client + 1])
        slot.rate, slot.keep = self.rate, self.keep
        return slot

    def product(self, left: Tensor, right: Tensor) -> None:
        """The gradient left @ right, (K, R, C): fused, ``value = keep * value - rate * left @ right`` in one pass."""
        count, rows, columns = left.shape[0], left.shape[1], right.shape[2]
        if self.grad is not None:
            torch.bmm(left, right, out=self.grad.view(count, rows, columns))
        elif count == 1:
            self.value.view(rows, columns).addmm_(left[0], right[0], beta=self.keep, alpha=-self.rate)
        else:
            self.value.view(count, rows, columns).baddbmm_(left, right, beta=self.keep, alpha=-self.rate)

    def add(self, gradient: Tensor) -> None:
        """A gradient that is there already, of the value's shape."""
        if self.grad is not None:
            self.grad.copy_(gradient)
            return
        if self.keep != 1.0:
            self.value.mul_(self.keep)
        self.value.sub_(gradient, alpha=self.rate)


class Stack:
    """All parameters of up to ``clients`` clients. fused: gradients are applied as they are found, none is stored."""

    def __init__(
        self, layouts: Sequence[Layout], clients: int, *, fused: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layouts = tuple(layouts)
        sizes = [math.prod(layout.shape) for layout in self.layouts]
        self.values = torch.zeros(clients, sum(sizes), dtype=dtype, device=device)
        self.grads = None if fused else torch.zeros_like(self.values)
        self.slots: dict[str, Slot] = {}
        start = 0
        for layout, size in zip(self.layouts, sizes, strict=True):
            views = [
                None if buffer is None else buffer[:, start : start + size].view(clients, *layout.stored)
                for buffer in (self.values, self.grads)
            ]
            assert views[0] is not None
            self.slots[layout.name] = Slot(views[0], views[1])
            start += size

    def flat(self, arrays: Sequence[Tensor]) -> Tensor:
        """(P,): tensors in the order of ``layouts``, as they are stored."""
        parts = [
            (tensor.permute(layout.order) if layout.order else tensor).reshape(-1)
            for tensor, layout in zip(arrays, self.layouts, strict=True)
        ]
        return torch.cat(parts).to(self.values)

    def arrays(self, clients: int) -> Arrays:
        """name -> (clients, ...) in the model's own layout."""
        found = {}
        for layout in self.layouts:
            value = self.slots[layout.name].value[:clients]
            if layout.order:
                value = value.permute(0, *(i + 1 for i in layout.inverse))
                if clients == 1:  # a matrix is turned in blocks here, what sums it would take it number by number
                    value = value[0].contiguous().unsqueeze(0)
            found[layout.name] = value.cpu().numpy()
        return found
