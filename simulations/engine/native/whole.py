"""A program as one list of operations for the kernels: whole local updates in a single call, client by client.

That is possible for a chain of layers that the kernels have, ending in a plain cross-entropy, under plain SGD. What stands
before the first layer (a transposition, scaling) is done by torch, for all examples at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx, nn

from simulations.engine import native
from simulations.engine.program.compiler import Program
from simulations.engine.program.layers import Conv1d, Linear
from simulations.engine.program.recurrent import Gru
from simulations.engine.program.steps import FlattenStep, LayerStep, MaxPoolStep, Region, ReluStep, Step

LINEAR, CONV, POOL, RELU, MEAN, LAST, GRU = range(7)  # kinds, as kernels.c numbers them
FIELDS = 18  # kind, 5 places of values, 4 of parameters, 8 sizes
NONE = -1
Floats = npt.NDArray[np.float64]


class NotAChain(Exception):
    """Why these steps are not one; they run step by step then."""


@dataclass
class Value:
    """shape: of one example, as torch has it. turned: (C, T) that lies as (T, C). at, gradient: its places in the room."""

    shape: tuple[int, ...]
    turned: bool = False
    at: int = NONE
    gradient: int = NONE

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> tuple[int, int]:
        """(T, C) as it lies."""
        if len(self.shape) == 1:
            return 1, self.shape[0]
        if len(self.shape) != 2:
            raise NotAChain(f"values of shape {self.shape}")
        return (self.shape[1], self.shape[0]) if self.turned else (self.shape[0], self.shape[1])


@dataclass
class Chain:
    """prefix: steps before the first layer. source: the value that they leave. turned: how the examples must lie."""

    prefix: list[Step]
    source: str
    turned: bool
    features: int
    classes: int
    operations: npt.NDArray[np.int64]
    room: int
    logits: int
    gradient: int


@dataclass
class _Writer:
    """Lowers one step after the other. batch: examples at most; offsets: of each parameter among those of a client."""

    batch: int
    offsets: dict[str, int]
    lanes: int
    modules: dict[str, nn.Module]
    room: int = 0
    found: list[list[int]] = field(default_factory=list)

    def place(self, size: int) -> int:
        """For ``size`` numbers of each example, up to whole vectors."""
        at, self.room = self.room, self.room + -(-size * self.batch // self.lanes) * self.lanes
        return at

    def new(self, shape: tuple[int, ...], *, turned: bool = False) -> Value:
        value = Value(shape, turned)
        value.at, value.gradient = self.place(value.size), self.place(value.size)
        return value

    def add(
        self, kind: int, x: Value, y: Value, sizes: Sequence[int], parameters: Sequence[str] = (), kept: int = 0
    ) -> Value:
        places = [self.offsets[name] if name else NONE for name in parameters]
        places += [NONE] * (4 - len(places))
        self.found.append([kind, x.at, y.at, kept, x.gradient, y.gradient, *places, *sizes, *([0] * (8 - len(sizes)))])
        return y

    def step(self, step: Step, x: Value) -> Value:
        if isinstance(step, LayerStep):
            return self.layer(step, x)
        if isinstance(step, ReluStep):
            return self.add(RELU, x, x, [x.size])  # in place: nothing else reads it
        if isinstance(step, MaxPoolStep):
            return self.pool(step, x)
        if isinstance(step, FlattenStep):
            return self.flat(x)
        if isinstance(step, Region):
            for node in step.nodes:
                x = self.node(node, x)
            return x
        raise NotAChain(type(step).__name__)

    def layer(self, step: LayerStep, x: Value) -> Value:
        layer = step.layer
        if any(math.prod(layout.shape) > native.LARGEST for layout in layer.layouts):
            raise NotAChain("large matrices")
        names = [layout.name for layout in layer.layouts]
        if isinstance(layer, Linear) and not (x.turned and x.shape[1] > 1):
            inputs, outputs = layer.layouts[0].shape[1], layer.layouts[0].shape[0]
            if x.shape[-1] != inputs:
                raise NotAChain("a linear layer over another dimension")
            y = self.new((*x.shape[:-1], outputs))
            return self.add(LINEAR, x, y, [x.size // inputs, inputs, outputs], names)
        if isinstance(layer, Conv1d) and x.turned:
            steps, channels = x.rows
            outputs, taps = layer.layouts[0].shape[0], layer.kernel
            out = (steps + 2 * layer.padding - layer.dilation * (taps - 1) - 1) // layer.stride + 1
            sizes = [steps, channels, outputs, taps, layer.stride, layer.padding, layer.dilation, out]
            return self.add(CONV, x, self.new((outputs, out), turned=True), sizes, names)
        if isinstance(layer, Gru) and not x.turned and len(x.shape) == 2 and not layer.hidden % self.lanes:
            steps, inputs = x.shape
            kept = self.place((5 * steps + 1) * layer.hidden)
            return self.add(GRU, x, self.new((steps, layer.hidden)), [steps, inputs, layer.hidden], names, kept)
        raise NotAChain(f"{type(layer).__name__} on values of shape {x.shape}")

    def pool(self, step: MaxPoolStep, x: Value) -> Value:
        if not x.turned:
            raise NotAChain("pooling over an image")
        (_, kernel), (_, stride), (_, padding) = step.settings
        steps, channels = x.rows
        out = (steps + 2 * padding - kernel) // stride + 1
        y, kept = self.new((channels, out), turned=True), self.place(channels * out)
        return self.add(POOL, x, y, [steps, channels, kernel, stride, padding, out, int(step.relu)], kept=kept)

    # single operations of a region

    def node(self, node: fx.Node, x: Value) -> Value:
        name = str(getattr(node.target, "__name__", node.target)) if node.op != "call_module" else ""
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        args = node.args[1:]
        if node.kwargs or any(isinstance(a, fx.Node) for a in args):
            raise NotAChain(f"{node.target}: other arguments")
        if isinstance(module, (nn.Identity, nn.Dropout)):  # dropout that does anything is refused before
            return x
        if isinstance(module, nn.AdaptiveAvgPool1d) and x.turned and module.output_size in (1, (1,)):
            return self.reshaped(self.mean(x), (x.shape[0], 1), turned=True)
        if name == "transpose" and len(x.shape) == 2 and set(map(int, args)) in ({1, 2}, {-1, -2}):  # type: ignore[arg-type]
            return self.reshaped(x, (x.shape[1], x.shape[0]), turned=not x.turned)
        if name == "mean" and len(x.shape) == 2 and len(args) == 1:
            (over,) = args[0] if isinstance(args[0], (tuple, list)) and len(args[0]) == 1 else (args[0],)
            if over in ((2, -1) if x.turned else (1, -2)):
                return self.mean(x)
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return self.chosen(args[0], x)
        if name == "squeeze" and len(args) == 1 and len(x.shape) == 2 and x.shape[1] == 1 and args[0] in (2, -1):
            return self.reshaped(x, (x.shape[0],))
        raise NotAChain(f"{node.target}")

    def reshaped(self, x: Value, shape: tuple[int, ...], *, turned: bool = False) -> Value:
        return Value(shape, turned, x.at, x.gradient)

    def flat(self, x: Value) -> Value:
        if x.turned and x.shape[0] > 1 and x.shape[1] > 1:
            raise NotAChain("channels last are not flat")
        return self.reshaped(x, (x.size,))

    def mean(self, x: Value) -> Value:
        return self.add(MEAN, x, self.new((x.rows[1],)), x.rows)

    def chosen(self, index: tuple[Any, ...], x: Value) -> Value:
        """One time of a sequence: x[:, t], or x[:, :, t] of (C, T)."""
        *before, at = index
        whole = all(part == slice(None) for part in before)
        if len(x.shape) != 2 or not whole or not isinstance(at, int) or len(before) != (2 if x.turned else 1):
            raise NotAChain(f"values [{index}]")
        steps, channels = x.rows
        return self.add(LAST, x, self.new((channels,)), [steps, channels, at % steps])


def chain(program: Program, examples: Tensor, batch: int) -> Chain:
    """examples: some of them, as the model is fed. Raises NotAChain."""
    steps, prefix = list(program.steps), list[Step]()
    values: dict[str, Any] = {program.inputs[0]: examples}
    while steps and isinstance(steps[0], Region) and not steps[0].live:
        prefix.append(steps.pop(0))
        prefix[-1].forward(values, {}, 1)
    if len(program.inputs) != 1 or not steps:
        raise NotAChain("several inputs")
    source = steps[0].reads[0]
    found = values.get(source)
    if not isinstance(found, Tensor) or found.dtype not in native.SUFFIX or len(found) != len(examples):
        raise NotAChain("the first layer does not read the examples alone")
    turned = isinstance(steps[0], LayerStep) and isinstance(steps[0].layer, Conv1d)
    offsets, at = dict[str, int](), 0
    for layout in program.layouts:
        offsets[layout.name] = at
        at += math.prod(layout.shape)
    writer = _Writer(batch, offsets, native.LANES[found.dtype], program.modules)
    value, name, uses = Value(tuple(found.shape[1:]), turned), source, _uses(program, steps)
    for step in steps:
        if list(step.reads) != [name] or uses[name] != 1:
            raise NotAChain(f"{name} is used by several steps")
        value = writer.step(step, value)
        name = _target(step)
    if [node.name for node in program.outputs] != [name] or len(value.shape) != 1 or value.at == NONE:
        raise NotAChain("its output is not one row an example")
    return Chain(
        prefix, source, turned, math.prod(found.shape[1:]), value.size, np.array(writer.found, np.int64), writer.room,
        value.at, value.gradient,
    )  # fmt: skip


def _uses(program: Program, steps: Sequence[Step]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in [name for step in steps for name in step.reads] + [node.name for node in program.outputs]:
        found[name] = found.get(name, 0) + 1
    return found


def _target(step: Step) -> str:
    if isinstance(step, Region):
        inside = [a.name for n in step.nodes for a in n.all_input_nodes]
        if len(step.writes) != 1 or len(set(inside)) != len(inside):
            raise NotAChain("a region that is no chain")
        return step.writes[0]
    return str(step.target)  # type: ignore[attr-defined]


def prepared(found: Chain, program: Program, examples: Tensor) -> Tensor:
    """What the first layer reads of these examples, (N, features) as the kernels want it."""
    values: dict[str, Any] = {program.inputs[0]: examples}
    for step in found.prefix:
        step.forward(values, {}, 1)
    x: Tensor = values[found.source]
    return (x.transpose(1, 2) if found.turned else x).contiguous()


def train(
    found: Chain,
    values: Tensor,
    first: int,
    data: Tensor,
    targets: Tensor,
    sizes: npt.NDArray[np.int64],
    steps: npt.NDArray[np.int64],
    denominators: Floats,
    origin: Tensor | None,
    offset: Tensor | None,
    rate: float,
    keep: float,
) -> tuple[Floats, Floats]:
    """Trains the clients ``first``.. of ``values`` (K, P), ``len(steps)`` of them, from ``origin`` (P,) or from what is there;
    returns (numerators, denominators) of their losses. offset (1 or ``len(steps)``, P): added after each step. data (N, ...), targets (N,): in the order of training; sizes: of each step; denominators: by batch size.
    """  # fmt: skip
    count = len(steps)
    totals, weights = np.zeros(count), np.zeros(count)
    place = found.operations.ctypes.data
    native.run(
        "train", data, count, len(found.operations), place, FIELDS, found.features, found.classes, found.logits,
        found.gradient, found.room, values.stride(0), data.data_ptr(), targets.data_ptr(), sizes.ctypes.data,
        steps.ctypes.data, denominators.ctypes.data, native.place(origin), native.place(offset),
        0 if offset is None or len(offset) == 1 else offset.stride(0), values[first].data_ptr(), totals.ctypes.data,
        weights.ctypes.data, rate, keep,
    )  # fmt: skip
    return totals, weights
