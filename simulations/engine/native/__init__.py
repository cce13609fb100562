"""Compiled kernels for the parts of a pass that cost most in small models.

Each function has a twin in torch operations beside its caller, and is held to it by the tests. They take contiguous tensors in this
machine's memory; parameters are those of a Stack, whose clients lie ``stride(0)`` apart. Gradients go to ``Slot.grad`` where
there is one, else straight into ``Slot.value``, as in ``Slot.product``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simulations.engine.native.build import library
from simulations.engine.native.build import version as version
from simulations.engine.program.slots import Slot

INT, REF = ctypes.c_int64, ctypes.c_void_p
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
REALS = {"f32": ctypes.c_float, "f64": ctypes.c_double}
LANES = {torch.float32: 8, torch.float64: 4}  # numbers in a vector of the kernels
PLACES = {torch.float32: torch.int32, torch.float64: torch.int64}  # what says which number of a window was the largest
LARGEST = 1 << 16  # elements of a matrix: larger ones are read in blocks, once in each direction
FEW_ROWS = 32  # of examples: with more, products of larger matrices are left to the BLAS
SIGNATURES = {  # i: integer, p: pointer, r: number of the arithmetic
    "linear_forward": "iiiii pppp",
    "linear_backward": "iiiii ppppppp rr",
    "conv_forward": "p pppp",
    "conv_backward": "p ppppppp rr",
    "pool_forward": "iiiiiiii ppp",
    "pool_backward": "iiiiiiii pppp",
    "cross_entropy": "iii pp r pp",
    "image_forward": "p pppp",
    "image_backward": "p ppppppp rr",
    "image_pool_forward": "p ppp",
    "image_pool_backward": "p ppp",
    "wide_forward": "iiiii pppp",
    "wide_backward": "iiiii ppppppp rr",
    "gru_forward": "p pppppppp",
    "gru_backward": "p pppppppppppppp rr",
    "train": "ii p iiiiiii ppppp pp i ppp rr",
}
OUT_OF_MEMORY = 1


class Kernels:
    """The functions of the library, by name and arithmetic ("f32", "f64")."""

    def __init__(self, found: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, str], Any] = {}
        for name, arguments in SIGNATURES.items():
            for suffix, real in REALS.items():
                kinds = {"i": INT, "p": REF, "r": real}
                function = getattr(found, f"{name}_{suffix}")
                function.argtypes, function.restype = [kinds[a] for a in arguments.replace(" ", "")], ctypes.c_int
                self._functions[name, suffix] = function
        self.permutations = found.permutations
        self.permutations.argtypes, self.permutations.restype = [INT, INT, REF, REF], ctypes.c_int

    def __call__(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Raises MemoryError; ValueError for a target that is no class."""
        code = self._functions[name, SUFFIX[dtype]](*arguments)
        if code == OUT_OF_MEMORY:
            raise MemoryError(f"{name}: no memory for its scratch space")
        if code:
            raise ValueError(f"{name}: a target is no class")


@functools.cache
def kernels() -> Kernels | None:
    found = library()
    return None if found is None else Kernels(found)


def usable(x: Tensor, slot: Slot | None = None) -> bool:
    """Whether the kernels are there, and take this tensor with these parameters."""
    fits = x.dtype in SUFFIX and x.device.type == "cpu" and (slot is None or slot.value.dtype == x.dtype)
    return fits and kernels() is not None


def small(slot: Slot) -> bool:
    """Whether the matrices of this parameter are small enough."""
    return slot.value[0].numel() <= LARGEST


def takes_linear(slot: Slot, rows: int) -> bool:
    """Whether there is a kernel for products of so many rows with this matrix."""
    return small(slot) or rows <= FEW_ROWS


def run(name: str, x: Tensor, *arguments: Any) -> None:
    found = kernels()
    assert found is not None, "asked before usable()"
    found(name, x.dtype, *arguments)


def place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def gradients(*slots: Slot | None) -> list[int | None]:
    return [None if slot is None else place(slot.grad) for slot in slots]


def values(*slots: Slot | None) -> list[int | None]:
    return [None if slot is None else slot.value.data_ptr() for slot in slots]


@functools.lru_cache(maxsize=256)
def fields(*numbers: int) -> Any:
    """A struct of integers."""
    return (INT * len(numbers))(*numbers)


# linear layers


def linear(x: Tensor, weight: Slot, bias: Slot | None) -> Tensor:
    """x (K, R, I) -> (K, R, O); weight (K, I, O)."""
    clients, rows, inputs = x.shape
    outputs = weight.value.shape[2]
    y = x.new_empty(clients, rows, outputs)
    run(
        "linear_forward" if small(weight) else "wide_forward", x, clients, rows, inputs, outputs, weight.value.stride(0),
        x.data_ptr(), *values(weight, bias), y.data_ptr(),
    )  # fmt: skip
    return y


def linear_backward(x: Tensor, dy: Tensor, weight: Slot, bias: Slot | None, *, wanted: bool) -> Tensor | None:
    """Of ``linear``: the input's gradient where it is wanted; the parameters' go to their slots."""
    clients, rows, inputs = x.shape
    dx = torch.empty_like(x) if wanted else None
    run(
        "linear_backward" if small(weight) else "wide_backward", x, clients, rows, inputs, dy.shape[2],
        weight.value.stride(0), x.data_ptr(), dy.data_ptr(), *values(weight, bias), *gradients(weight, bias), place(dx),
        weight.rate, weight.keep,
    )  # fmt: skip
    return dx


# convolutions and pooling over time, channels last


def conv(x: Tensor, weight: Slot, bias: Slot | None, settings: Sequence[int]) -> Tensor:
    """x (K B, T, C) -> (K B, T', O); weight (K, taps, C, O); settings: (stride, padding, dilation, T')."""
    outputs = weight.value.shape[3]
    y = x.new_empty(x.shape[0], settings[3], outputs)
    run("conv_forward", x, _conv(x, weight, settings), x.data_ptr(), *values(weight, bias), y.data_ptr())
    return y


def conv_backward(
    x: Tensor, dy: Tensor, weight: Slot, bias: Slot | None, settings: Sequence[int], *, wanted: bool
) -> Tensor | None:
    dx = torch.empty_like(x) if wanted else None
    run(
        "conv_backward", x, _conv(x, weight, settings), x.data_ptr(), dy.data_ptr(), *values(weight, bias),
        *gradients(weight, bias), place(dx), weight.rate, weight.keep,
    )  # fmt: skip
    return dx


def _conv(x: Tensor, weight: Slot, settings: Sequence[int]) -> Any:
    clients, taps, channels, outputs = weight.value.shape
    stride, padding, dilation, out = settings
    between = weight.value.stride(0)
    batch, steps = x.shape[0] // clients, x.shape[1]
    return fields(clients, batch, steps, channels, outputs, taps, stride, padding, dilation, out, between)


def pool(x: Tensor, kernel: int, stride: int, padding: int, *, relu: bool) -> tuple[Tensor, Tensor]:
    """x (N, T, C) -> (N, T', C), and where each maximum was."""
    count, steps, channels = x.shape
    out = (steps + 2 * padding - kernel) // stride + 1
    y = x.new_empty(count, out, channels)
    which = torch.empty(y.shape, dtype=torch.int32)
    run(
        "pool_forward", x, count, steps, channels, kernel, stride, padding, out, int(relu), x.data_ptr(), y.data_ptr(),
        which.data_ptr(),
    )  # fmt: skip
    return y, which


def pool_backward(dy: Tensor, y: Tensor, which: Tensor, steps: int, settings: Sequence[int], *, relu: bool) -> Tensor:
    """settings: (kernel, stride, padding)."""
    count, out, channels = y.shape
    dx = dy.new_empty(count, steps, channels)
    run(
        "pool_backward", dy, count, steps, channels, *settings, out, int(relu), dy.data_ptr(), y.data_ptr(),
        which.data_ptr(), dx.data_ptr(),
    )  # fmt: skip
    return dx


# convolutions and pooling over images, channels last

Pair = tuple[int, int]


def image(x: Tensor, weight: Slot, bias: Slot | None, stride: Pair, padding: Pair) -> Tensor:
    """x (K B, H, W, C) -> (K B, H', W', O); weight (K, O, tall, wide, C)."""
    sizes = _image(x, weight, stride, padding)
    y = x.new_empty(x.shape[0], *sizes[-3:-1], weight.value.shape[1])
    run("image_forward", x, fields(*sizes), x.data_ptr(), *values(weight, bias), y.data_ptr())
    return y


def image_backward(
    x: Tensor, dy: Tensor, weight: Slot, bias: Slot | None, stride: Pair, padding: Pair, *, wanted: bool
) -> Tensor | None:
    dx = torch.empty_like(x) if wanted else None
    run(
        "image_backward", x, fields(*_image(x, weight, stride, padding)), x.data_ptr(), dy.data_ptr(), *values(weight, bias),
        *gradients(weight, bias), place(dx), weight.rate, weight.keep,
    )  # fmt: skip
    return dx


def _image(x: Tensor, weight: Slot, stride: Pair, padding: Pair) -> tuple[int, ...]:
    clients, outputs, tall, wide, channels = weight.value.shape
    count, height, width, _ = x.shape
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, (tall, wide), stride, strict=True)]
    sizes = (clients, count // clients, height, width, channels, outputs, tall, wide)
    return (*sizes, *stride, *padding, *out, weight.value.stride(0))


def image_pool(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, *, relu: bool, planar: bool
) -> tuple[Tensor, Tensor]:
    """x (N, H, W, C) -> (N, H', W', C), or (N, C, H', W') where ``planar``; and which of each window was the largest."""
    sizes = _image_pool(x.shape, kernel, stride, padding, relu, planar)
    count, channels, out_h, out_w = x.shape[0], x.shape[3], *sizes[-4:-2]
    y = x.new_empty((count, channels, out_h, out_w) if planar else (count, out_h, out_w, channels))
    which = torch.empty(count, out_h, out_w, channels, dtype=PLACES[x.dtype])
    run("image_pool_forward", x, fields(*sizes), x.data_ptr(), y.data_ptr(), which.data_ptr())
    return y, which


def image_pool_backward(
    dy: Tensor, which: Tensor, shape: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, *, planar: bool
) -> Tensor:
    """dy: of the shape that ``image_pool`` returned; shape: of its x."""
    dx = dy.new_empty(tuple(shape))
    sizes = fields(*_image_pool(shape, kernel, stride, padding, False, planar))
    run("image_pool_backward", dy, sizes, dy.data_ptr(), which.data_ptr(), dx.data_ptr())
    return dx


def _image_pool(
    shape: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, relu: bool, planar: bool
) -> tuple[int, ...]:
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape[1:3], padding, kernel, stride, strict=True)]
    return (*shape, *kernel, *stride, *padding, *out, int(relu), int(planar))


# cross-entropy


def cross_entropy(outputs: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """outputs (K, B, C), targets (K, B) int64: the sums (K,), and the gradient of scale * sum."""
    clients, batch, classes = outputs.shape
    sums, gradient = outputs.new_empty(clients), torch.empty_like(outputs)
    run(
        "cross_entropy", outputs, clients, batch, classes, outputs.data_ptr(), targets.data_ptr(), scale, sums.data_ptr(),
        gradient.data_ptr(),
    )  # fmt: skip
    return sums, gradient


# recurrent layers


def gru(x: Tensor, slots: Sequence[Slot]) -> tuple[Tensor, Tensor, Tensor]:
    """x (K B, T, I); slots: W_in, W_state, b_in, b_state. Returns gates (K, T, B, 3 H), inner (K, T, B, H) and states
    (K, T + 1, B, H), the first of them zero.
    """
    clients, hidden = slots[1].value.shape[0], slots[1].value.shape[2]
    batch, steps = x.shape[0] // clients, x.shape[1]
    made = (
        x.new_empty(clients, steps, batch, 3 * hidden),
        x.new_empty(clients, steps, batch, hidden),
        x.new_empty(clients, steps + 1, batch, hidden),
    )
    run("gru_forward", x, _gru(x, slots), x.data_ptr(), *values(*slots), *map(place, made))
    return made


def gru_backward(
    x: Tensor, dy: Tensor, slots: Sequence[Slot], made: tuple[Tensor, Tensor, Tensor], *, wanted: bool
) -> Tensor | None:
    """made: what ``gru`` returned; its gates are overwritten."""
    dx = torch.empty_like(x) if wanted else None
    run(
        "gru_backward", x, _gru(x, slots), x.data_ptr(), dy.data_ptr(), *values(*slots), *gradients(*slots),
        *map(place, made), place(dx), slots[0].rate, slots[0].keep,
    )  # fmt: skip
    return dx


def _gru(x: Tensor, slots: Sequence[Slot]) -> Any:
    clients, hidden = slots[1].value.shape[0], slots[1].value.shape[2]
    return fields(clients, x.shape[0] // clients, x.shape[1], x.shape[2], hidden, slots[1].value.stride(0))


# orders of examples


def permutations(keys: Sequence[int], count: int) -> npt.NDArray[np.int64] | None:
    """(K, count): of each key, ``numpy.random.default_rng(key).permutation(count)``; None without kernels."""
    found = kernels()
    if found is None or count >= 1 << 32:
        return None
    words, out = np.array(keys, np.uint64), np.empty((len(keys), count), np.int64)
    found.permutations(len(words), count, words.ctypes.data, out.ctypes.data)
    return out
