"""Layers with parameters: forward over (K * B, ...), and a backward that hands each gradient to its slot.

In ``backward`` the gradient of the input is taken before the weights change: a fused update changes them in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from simulations.engine import native
from simulations.engine.program.slots import Layout, Slot


class Layer(ABC):
    """``layouts``: of its parameters. Between ``forward`` and ``backward`` it keeps what the backward pass needs."""

    layouts: tuple[Layout, ...] = ()
    _x: Tensor

    @abstractmethod
    def forward(self, x: Tensor, slots: dict[str, Slot], clients: int) -> Tensor: ...

    @abstractmethod
    def backward(self, dy: Tensor, slots: dict[str, Slot], clients: int, *, wanted: bool) -> Tensor | None:
        """The input's gradient where it is ``wanted``."""


class Linear(Layer):
    """x (K B, ..., I) -> (K B, ..., O). The matrix lies as (I, O): all three products are faster that way on a CPU."""

    def __init__(self, module: nn.Linear, name: str) -> None:
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else ""
        found = [Layout(self.weight, tuple(module.weight.shape), (1, 0))]
        if module.bias is not None:
            found.append(Layout(self.bias, tuple(module.bias.shape)))
        self.layouts = tuple(found)

    def forward(self, x: Tensor, slots: dict[str, Slot], clients: int) -> Tensor:
        slot, bias = slots[self.weight], slots[self.bias] if self.bias else None
        self._shape = x.shape
        self._x = x.reshape(clients, -1, x.shape[-1])
        self._compiled = native.usable(x, slot) and native.takes_linear(slot, self._x.shape[1])
        if self._compiled:
            self._x = self._x.contiguous()
            y = native.linear(self._x, slot, bias)
        else:
            y = affine(self._x, slot.value, None if bias is None else bias.value)
        return y.view(*x.shape[:-1], slot.value.shape[2])

    def backward(self, dy: Tensor, slots: dict[str, Slot], clients: int, *, wanted: bool) -> Tensor | None:
        slot, bias = slots[self.weight], slots[self.bias] if self.bias else None
        dy = dy.reshape(clients, -1, dy.shape[-1])
        if self._compiled:
            found = native.linear_backward(self._x, dy.contiguous(), slot, bias, wanted=wanted)
            del self._x
            return None if found is None else found.view(self._shape)
        dx = product(dy, slot.value.transpose(1, 2)).view(self._shape) if wanted else None
        slot.product(self._x.transpose(1, 2), dy)
        if self.bias:
            slots[self.bias].add(dy.sum(1))
        del self._x
        return dx


def product(left: Tensor, right: Tensor) -> Tensor:
    """(K, R, M) @ (K, M, C); for one client without the batched call, whose checks cost more than a small product."""
    return (left[0] @ right[0]).unsqueeze(0) if len(left) == 1 else torch.bmm(left, right)


def affine(x: Tensor, matrix: Tensor, offset: Tensor | None) -> Tensor:
    """x (K, R, I), matrix (K, I, O), offset (K, O)."""
    if offset is None:
        return product(x, matrix)
    if len(x) == 1:
        return torch.addmm(offset[0], x[0], matrix[0]).unsqueeze(0)
    return torch.baddbmm(offset.unsqueeze(1), x, matrix)


class Conv1d(Layer):
    """x (K B, C, T) -> (K B, O, T'), channels last in memory: windows of one contiguous sequence, then a matrix product."""

    def __init__(self, module: nn.Conv1d, name: str) -> None:
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else ""
        self.kernel, self.stride = module.kernel_size[0], module.stride[0]
        self.padding, self.dilation = int(module.padding[0]), module.dilation[0]
        found = [Layout(self.weight, tuple(module.weight.shape), (2, 1, 0))]
        if module.bias is not None:
            found.append(Layout(self.bias, tuple(module.bias.shape)))
        self.layouts = tuple(found)

    @staticmethod
    def fits(module: nn.Conv1d) -> bool:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, x: Tensor, slots: dict[str, Slot], clients: int) -> Tensor:
        count, channels, steps = x.shape
        sequence, slot = x.transpose(1, 2), slots[self.weight]
        self._compiled = native.usable(x, slot) and native.small(slot)
        if self._compiled:
            out = (steps + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1
            self._settings, self._columns = (self.stride, self.padding, self.dilation, out), sequence.contiguous()
            y = native.conv(self._columns, slot, slots[self.bias] if self.bias else None, self._settings)
            return y.transpose(1, 2)
        padded = x.new_zeros(count, steps + 2 * self.padding, channels) if self.padding else sequence.contiguous()
        if self.padding:
            padded[:, self.padding : self.padding + steps] = sequence
        self._length, self._steps = padded.shape[1], steps
        self._out = (self._length - self.dilation * (self.kernel - 1) - 1) // self.stride + 1
        windows = padded.as_strided(
            (count, self._out, self.kernel, channels),
            (self._length * channels, self.stride * channels, self.dilation * channels, 1),
        )
        self._columns = windows.reshape(clients, -1, self.kernel * channels)
        found = affine(self._columns, self._matrix(slots, clients), slots[self.bias].value if self.bias else None)
        return found.view(count, self._out, -1).transpose(1, 2)

    def _matrix(self, slots: dict[str, Slot], clients: int) -> Tensor:
        value = slots[self.weight].value  # (K, taps, C, O)
        return value.view(clients, -1, value.shape[3])

    def backward(self, dy: Tensor, slots: dict[str, Slot], clients: int, *, wanted: bool) -> Tensor | None:
        slot, count, outputs = slots[self.weight], dy.shape[0], dy.shape[1]
        if self._compiled:
            bias = slots[self.bias] if self.bias else None
            down, sequence = dy.transpose(1, 2).contiguous(), self._columns
            del self._columns
            found = native.conv_backward(sequence, down, slot, bias, self._settings, wanted=wanted)
            return None if found is None else found.transpose(1, 2)
        dy = dy.transpose(1, 2).reshape(clients, -1, outputs)
        dx = None
        if wanted:
            columns = product(dy, self._matrix(slots, clients).transpose(1, 2))
            dx = self._folded(columns.view(count, self._out, self.kernel, -1)).transpose(1, 2)
        slot.product(self._columns.transpose(1, 2), dy)
        if self.bias:
            slots[self.bias].add(dy.sum(1))
        del self._columns
        return dx

    def _folded(self, columns: Tensor) -> Tensor:
        """The adjoint of taking windows: (N, T', kernel, C) -> (N, T, C)."""
        count, _, _, channels = columns.shape
        padded = columns.new_zeros(count, self._length, channels)
        for tap in range(self.kernel):
            first = tap * self.dilation
            padded[:, first : first + self.stride * (self._out - 1) + 1 : self.stride].add_(columns[:, :, tap])
        return padded[:, self.padding : self.padding + self._steps]


class Conv2d(Layer):
    """x (K B, C, H, W) -> (K B, O, H', W'), channels last in memory; one client after the other."""

    def __init__(self, module: nn.Conv2d, name: str) -> None:
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else ""
        self.settings: tuple[Any, ...] = (module.stride, module.padding, module.dilation, module.groups)
        found = [Layout(self.weight, tuple(module.weight.shape), (0, 2, 3, 1))]
        if module.bias is not None:
            found.append(Layout(self.bias, tuple(module.bias.shape)))
        self.layouts = tuple(found)

    @staticmethod
    def fits(module: nn.Conv2d) -> bool:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, x: Tensor, slots: dict[str, Slot], clients: int) -> Tensor:
        slot, bias = slots[self.weight], slots[self.bias] if self.bias else None
        self._compiled = native.usable(x, slot) and self._simple()
        if self._compiled:
            self._x = x.permute(0, 2, 3, 1).contiguous()
            return native.image(self._x, slot, bias, *self.settings[:2]).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last)
        self._x = x.view(clients, -1, *x.shape[1:])
        kernels = slots[self.weight].value.permute(0, 1, 4, 2, 3)
        parts = [
            functional.conv2d(self._x[k], kernels[k], slots[self.bias].value[k] if self.bias else None, *self.settings)
            for k in range(clients)
        ]
        return parts[0] if clients == 1 else torch.cat(parts)

    def backward(self, dy: Tensor, slots: dict[str, Slot], clients: int, *, wanted: bool) -> Tensor | None:
        """The weights' gradient as one product with the windows of x: several times faster than oneDNN's own on a CPU."""
        slot = slots[self.weight]
        if self._compiled:
            bias, down, x = slots[self.bias] if self.bias else None, dy.permute(0, 2, 3, 1).contiguous(), self._x
            del self._x
            found = native.image_backward(x, down, slot, bias, *self.settings[:2], wanted=wanted)
            return None if found is None else found.permute(0, 3, 1, 2)
        dy = dy.contiguous(memory_format=torch.channels_last).view(clients, -1, *dy.shape[1:])
        windows = self._settings_fit(slot)
        dx, dw = [], []
        for k in range(clients):
            if wanted or not windows:
                found = self._transposed(dy[k], k, slot.value[k].permute(0, 3, 1, 2), wanted, not windows)
                dx.append(found[0])
                dw.append(found[1])
        rows = dy.permute(0, 1, 3, 4, 2).reshape(clients, -1, dy.shape[2])
        if windows:
            for k in range(clients):
                slot.of(k).product(rows[k : k + 1].transpose(1, 2), self._windows(self._x[k], slot.value.shape[2:4]))
        else:
            slot.add(torch.stack(dw).permute(0, 1, 3, 4, 2))
        if self.bias:
            slots[self.bias].add(rows.sum(1))
        del self._x
        if not wanted:
            return None
        return dx[0] if clients == 1 else torch.cat(dx)

    def _simple(self) -> bool:
        return self.settings[2] == (1, 1) and int(self.settings[3]) == 1

    def _settings_fit(self, slot: Slot) -> bool:
        return int(self.settings[3]) == 1 and slot.value.device.type == "cpu"

    def _transposed(self, dy: Tensor, client: int, kernel: Tensor, wanted: bool, weights: bool) -> Any:
        stride, padding, dilation, groups = self.settings
        return torch.ops.aten.convolution_backward(
            dy, self._x[client], kernel, [dy.shape[1]], stride, padding, dilation, False, [0, 0], groups,
            [wanted, weights, False],
        )  # fmt: skip

    def _windows(self, x: Tensor, kernel: torch.Size) -> Tensor:
        """x (B, C, H, W) -> (1, B H' W', kh kw C)."""
        (sh, sw), (ph, pw), (dh, dw), _ = self.settings
        if ph or pw:
            x = functional.pad(x, (pw, pw, ph, ph)).contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        out_h, out_w = (
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip((height, width), kernel, (sh, sw), (dh, dw), strict=True)
        )
        row = width * channels
        view = x.permute(0, 2, 3, 1).as_strided(
            (count, out_h, out_w, kernel[0], kernel[1], channels),
            (height * row, sh * row, sw * channels, dh * row, dw * channels, 1),
            x.storage_offset(),
        )
        return view.reshape(1, count * out_h * out_w, -1)


class GroupNorm(Layer):
    """Group normalisation over (K B, C), (K B, C, T) or (K B, C, H, W); scale and offset are each client's own."""

    def __init__(self, module: nn.GroupNorm, name: str) -> None:
        self.groups, self.eps = module.num_groups, module.eps
        self.weight, self.bias = (f"{name}.weight", f"{name}.bias") if module.affine else ("", "")
        shape = (module.num_channels,)
        self.layouts = (Layout(self.weight, shape), Layout(self.bias, shape)) if module.affine else ()

    def forward(self, x: Tensor, slots: dict[str, Slot], clients: int) -> Tensor:
        self._shape = x.shape
        if x.dim() == 3:  # as an image of one row: torch has a kernel for channels last there
            x = x.unsqueeze(2)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        count, channels = x.shape[:2]
        self._x, area = x, x[0, 0].numel()
        plain, self._mean, self._rstd = torch.native_group_norm(
            x, None, None, count, channels, area, self.groups, self.eps
        )
        if not self.weight:
            return plain.view(self._shape) if x.dim() == 2 else _without_row(plain, self._shape)
        self._plain = plain
        scale, offset = (self._spread(slots[n].value, clients, x) for n in (self.weight, self.bias))
        y = torch.addcmul(offset, plain.view(clients, -1, *plain.shape[1:]), scale)
        return _without_row(y.view(plain.shape), self._shape)

    @staticmethod
    def _spread(value: Tensor, clients: int, x: Tensor) -> Tensor:
        return value.view(clients, 1, -1, *(1 for _ in x.shape[2:]))

    def backward(self, dy: Tensor, slots: dict[str, Slot], clients: int, *, wanted: bool) -> Tensor | None:
        x = self._x
        if len(self._shape) == 3:
            dy = dy.unsqueeze(2)
        if x.dim() == 4:
            dy = dy.contiguous(memory_format=torch.channels_last)
        inner = dy
        if self.weight:
            split = dy.view(clients, -1, *dy.shape[1:])
            places = [1, *range(3, split.dim())]
            dscale = (split * self._plain.view(split.shape)).sum(places)
            doffset = split.sum(places)
            if wanted:
                inner = (split * self._spread(slots[self.weight].value, clients, x)).view(dy.shape)
            slots[self.weight].add(dscale)
            slots[self.bias].add(doffset)
            del self._plain
        dx = None
        if wanted:
            count, channels = x.shape[:2]
            dx = torch.ops.aten.native_group_norm_backward(
                inner, x, self._mean, self._rstd, None, count, channels, x[0, 0].numel(), self.groups,
                [True, False, False],
            )[0]  # fmt: skip
            dx = _without_row(dx, self._shape)
        del self._x
        return dx


def _without_row(x: Tensor, shape: torch.Size) -> Tensor:
    return x.squeeze(2) if len(shape) == 3 else x
