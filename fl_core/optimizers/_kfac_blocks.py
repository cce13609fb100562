"""What K-FAC needs to know of a layer: its activations, its output's gradients, and its gradient as a matrix.

A block's Fisher matrix is taken as A (x) G with A = mean over examples of sum_t a a^T and G = N / T sum_t g g^T, where t
runs over the T positions that share the weights, a are the inputs at a position (with a one for the bias), and g the
gradients there of the mean loss of N examples (Martens & Grosse, ICML 2015; Grosse & Martens, ICML 2016). Shapes here:
activations (N, T, B, d), gradients (N, T, B, o), matrix (B, o, d), with B independent parts (groups of a convolution).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Normalisation = nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._BatchNorm
CHUNK = 1 << 23  # values of unfolded activations held at once


class Block(ABC):
    """Some parameters of one module whose curvature is one Kronecker product (or several, in parts)."""

    parts: int
    d: int
    o: int
    parameters: list[nn.Parameter]

    @abstractmethod
    def factors(self, x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the examples (B, d, d) of a a^T and (B, o, o) of g g^T / T, from input, output and its gradient."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The gradient (B, o, d)."""

    @abstractmethod
    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of ``matrix``: one tensor for each of ``parameters``."""


def outer(values: Tensor) -> Tensor:
    """(N, T, B, d) -> (B, d, d): the sum over examples and positions of the outer products."""
    flat = values.flatten(0, 1).transpose(0, 1)
    return flat.transpose(1, 2) @ flat


def with_one(values: Tensor, bias: bool) -> Tensor:
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1) if bias else values


def reached(gy: Tensor) -> Tensor:
    """(N,) bool: the examples that the loss weighs. An example of weight zero (padding, an empty rank) has no gradient."""
    return (gy.flatten(1) != 0).any(dim=1)


class LinearBlock(Block):
    """x (N, ..., d) -> y (N, ..., o); dimensions between are positions that share the weights."""

    def __init__(self, module: nn.Linear) -> None:
        self.bias = module.bias is not None
        self.parts, self.o = 1, module.out_features
        self.d = module.in_features + self.bias
        self.parameters = list(module.parameters(recurse=False))

    def factors(self, x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        a = with_one(x.reshape(len(x), -1, 1, x.shape[-1]), self.bias)
        g = gy.reshape(len(gy), -1, 1, self.o)
        return outer(a), outer(g) / g.shape[1]

    def matrix(self) -> Tensor:
        return _matrix(self.parameters, 1, self.o)

    def split(self, matrix: Tensor) -> list[Tensor]:
        return _split(matrix, self.parameters)


class ConvolutionBlock(Block):
    """Conv1d, 2d, 3d with any stride, padding, dilation and groups: linear on the patches (N, T, groups, d)."""

    def __init__(self, module: Convolution) -> None:
        self.bias = module.bias is not None
        self.parts = module.groups
        self.o = module.out_channels // module.groups
        self.d = module.in_channels // module.groups * math.prod(module.kernel_size) + self.bias
        self.parameters = list(module.parameters(recurse=False))
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.padding, self.mode = _padding(module), module.padding_mode

    def factors(self, x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        return self._activations(x), _by_position(gy, self.parts)

    def _activations(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = functional.pad(x, self.padding, mode="constant" if self.mode == "zeros" else self.mode)
        total = x.new_zeros(self.parts, self.d, self.d)
        for chunk in _chunks(x, self.kernel, self.stride, self.dilation):
            total += outer(with_one(patches(chunk, self.kernel, self.stride, self.dilation, self.parts), self.bias))
        return total

    def matrix(self) -> Tensor:
        return _matrix(self.parameters, self.parts, self.o)

    def split(self, matrix: Tensor) -> list[Tensor]:
        return _split(matrix, self.parameters)


class TransposedBlock(Block):
    """The weights of ConvTranspose1d, 2d, 3d: the convolution that it transposes maps y to x, so the patches are of gy.

    Positions are the input's; the gradient (C_in, C_out / groups x kernel) is sum_t x_t patch_t(gy)^T.
    """

    def __init__(self, module: Transposed) -> None:
        self.parts = module.groups
        self.d = module.in_channels // module.groups
        self.o = module.out_channels // module.groups * math.prod(module.kernel_size)
        self.parameters = list(module.parameters(recurse=False))[:1]
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.padding: tuple[int, ...] = tuple(int(p) for p in module.padding)

    def factors(self, x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        positions = math.prod(x.shape[2:])
        padded = functional.pad(gy, [p for size in reversed(self.padding) for p in (size, size)])
        total = gy.new_zeros(self.parts, self.o, self.o)
        for chunk in _chunks(padded, self.kernel, self.stride, self.dilation):
            windows = _windows(chunk, self.kernel, self.stride, self.dilation)
            # output_padding adds rows that no input position reaches
            kept = windows[(slice(None), slice(None), *(slice(0, n) for n in x.shape[2:]))]
            total += outer(_gathered(kept, self.parts))
        return _by_position(x, self.parts) * positions, total / positions

    def matrix(self) -> Tensor:
        grad = _grad(self.parameters[0])
        return grad.reshape(self.parts, self.d, self.o).transpose(1, 2)

    def split(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.transpose(1, 2).reshape(self.parameters[0].shape)]


class BiasBlock(Block):
    """The bias of a transposed convolution: its block is exact, from each example's own gradient (N, o)."""

    def __init__(self, module: Transposed) -> None:
        self.parameters = list(module.parameters(recurse=False))[1:]
        self.parts, self.d, self.o = 1, 1, module.out_channels

    def factors(self, x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        g = gy.flatten(2).sum(dim=2)
        return gy.new_full((1, 1, 1), len(gy)), (g.T @ g)[None]

    def matrix(self) -> Tensor:
        return _grad(self.parameters[0]).reshape(1, self.o, 1)

    def split(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.reshape(self.o)]


class NormalisationBlock(Block):
    """Scale and shift, unit by unit: an exact 2 x 2 block each, from each example's gradient (Osawa et al., CVPR 2019)."""

    def __init__(self, module: Normalisation) -> None:
        self.module = module
        self.parameters = list(module.parameters(recurse=False))
        self.parts, self.d, self.o = module.weight.numel(), 1, len(self.parameters)

    def factors(self, x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = gy * self._normalised(x, y), gy
        if isinstance(self.module, nn.LayerNorm):
            each = [v.reshape(len(v), -1, self.parts).sum(dim=1) for v in (scale, shift)]
        else:
            each = [v.reshape(len(v), self.parts, -1).sum(dim=2) for v in (scale, shift)]
        g = torch.stack(each[: self.o], dim=2)
        return gy.new_full((self.parts, 1, 1), len(gy)), torch.einsum("nco,ncp->cop", g, g)

    def _normalised(self, x: Tensor, y: Tensor) -> Tensor:
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        # Batch statistics may be global ones: undo the affine map instead of taking them again.
        shape = (1, -1, *(1,) * (y.ndim - 2))
        weight = module.weight.detach().reshape(shape)
        shift = module.bias.detach().reshape(shape) if module.bias is not None else 0.0
        return (y - shift) / torch.where(weight == 0, torch.ones_like(weight), weight)

    def matrix(self) -> Tensor:
        return torch.stack([_grad(p).reshape(-1) for p in self.parameters], dim=1)[:, :, None]

    def split(self, matrix: Tensor) -> list[Tensor]:
        return [matrix[:, i, 0].reshape(p.shape) for i, p in enumerate(self.parameters)]


def blocks_of(module: nn.Module) -> Iterator[Block]:
    """The blocks of one module's own parameters; none where a parameter is frozen, shared, or of an unknown layer."""
    own = list(module.parameters(recurse=False))
    if not own or not all(p.requires_grad for p in own):
        return
    if type(module) is nn.Linear:
        yield LinearBlock(module)
    elif isinstance(module, Convolution):
        yield ConvolutionBlock(module)
    elif isinstance(module, Transposed):
        yield TransposedBlock(module)
        if module.bias is not None:
            yield BiasBlock(module)
    elif isinstance(module, Normalisation):
        yield NormalisationBlock(module)


def patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], parts: int
) -> Tensor:
    """x (N, C, ...), already padded -> (N, T, parts, C / parts x kernel): what a convolution multiplies, by position."""
    return _gathered(_windows(x, kernel, stride, dilation), parts)


def _windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """A view (N, C, positions..., kernel...) without a copy."""
    x = x.contiguous()
    places = _places(x, kernel, stride, dilation)
    base = x.stride()[2:]
    steps = [s * b for s, b in zip(stride, base, strict=True)] + [d * b for d, b in zip(dilation, base, strict=True)]
    return x.as_strided((*x.shape[:2], *places, *kernel), (*x.stride()[:2], *steps))


def _gathered(windows: Tensor, parts: int) -> Tensor:
    count, channels = windows.shape[:2]
    dims = (windows.ndim - 2) // 2
    places, kernel = windows.shape[2 : 2 + dims], windows.shape[2 + dims :]
    split = windows.reshape(count, parts, channels // parts, *places, *kernel)
    order = (0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
    return split.permute(order).reshape(count, math.prod(places), parts, channels // parts * math.prod(kernel))


def _places(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes)


def _chunks(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Examples in chunks whose patches fit in CHUNK values: a volume's patches are 27 times the volume."""
    one = math.prod(_places(x, kernel, stride, dilation)) * x.shape[1] * math.prod(kernel)
    return tuple(x.split(max(1, CHUNK // max(1, one))))


def _by_position(values: Tensor, parts: int) -> Tensor:
    """(N, C, ...) -> (parts, C / parts, C / parts): sum over examples, mean over positions of the outer products."""
    flat = values.reshape(len(values), parts, values.shape[1] // parts, -1)
    return torch.einsum("npct,npdt->pcd", flat, flat) / flat.shape[3]


def _padding(module: Convolution) -> list[int]:
    """As functional.pad wants it: the last dimension first, before and after."""
    pairs: list[tuple[int, int]] = []
    for i, (k, d) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            total = d * (k - 1)
            pairs.append((total // 2, total - total // 2))
        else:
            size = 0 if module.padding == "valid" else int(module.padding[i])
            pairs.append((size, size))
    return [p for pair in reversed(pairs) for p in pair]


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _matrix(parameters: list[nn.Parameter], parts: int, o: int) -> Tensor:
    weight = _grad(parameters[0]).reshape(parts, o, -1)
    return torch.cat([weight, _grad(parameters[1]).reshape(parts, o, 1)], dim=2) if len(parameters) == 2 else weight


def _split(matrix: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    if len(parameters) == 1:
        return [matrix.reshape(parameters[0].shape)]
    return [matrix[..., :-1].reshape(parameters[0].shape), matrix[..., -1].reshape(parameters[1].shape)]
