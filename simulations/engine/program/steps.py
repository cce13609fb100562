"""The steps of a program: layers, the common operations without parameters, and regions of anything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from simulations.engine import native
from simulations.engine.program.layers import Layer
from simulations.engine.program.slots import Slot

Values = dict[str, Any]
Slots = dict[str, Slot]


class Gradients:
    """Of the values of one pass, by name: several uses of one value add up."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        self._found[name] = self._found[name] + gradient if name in self._found else gradient

    def take(self, name: str) -> Tensor | None:
        return self._found.pop(name, None)


class Step(ABC):
    """reads, writes: names of values. ``live`` ones depend on parameters, so gradients flow back through them."""

    reads: Sequence[str]

    @abstractmethod
    def forward(self, values: Values, slots: Slots, clients: int) -> None: ...

    @abstractmethod
    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None: ...


class LayerStep(Step):
    def __init__(self, layer: Layer, source: str, target: str, *, wanted: bool) -> None:
        self.layer, self.source, self.target, self.wanted = layer, source, target, wanted
        self.reads = (source,)

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        values[self.target] = self.layer.forward(values[self.source], slots, clients)

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        dy = grads.take(self.target)
        if dy is None:
            raise RuntimeError(f"{self.target}: nothing that follows uses it")
        dx = self.layer.backward(dy, slots, clients, wanted=self.wanted)
        if dx is not None:
            grads.add(self.source, dx)


class ReluStep(Step):
    """in_place: the source is a layer's output that nothing else reads."""

    def __init__(self, source: str, target: str, *, in_place: bool) -> None:
        self.source, self.target, self.in_place = source, target, in_place
        self.reads = (source,)

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        x = values[self.source]
        self._y = values[self.target] = x.relu_() if self.in_place else x.relu()

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        dy = grads.take(self.target)
        if dy is not None:
            grads.add(self.source, torch.ops.aten.threshold_backward(dy, self._y, 0))
        del self._y


class SumStep(Step):
    """Two values of one shape."""

    def __init__(self, sources: tuple[str, str], target: str, live: frozenset[str]) -> None:
        self.sources, self.target, self.live = sources, target, live
        self.reads = sources

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        a, b = (values[name] for name in self.sources)
        self._shapes = [a.shape, b.shape]
        values[self.target] = a + b

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        dy = grads.take(self.target)
        if dy is None:
            return
        for name, shape in zip(self.sources, self._shapes, strict=True):
            if name in self.live:
                grads.add(name, dy if shape == dy.shape else dy.sum_to_size(shape))


class MaxPoolStep(Step):
    """Over the last one or two dimensions, channels last in memory. relu: of the result, which is cheaper than before; planar:
    images leave it as (N, C, H, W) in memory, because what reads them flattens them.
    """

    def __init__(
        self,
        source: str,
        target: str,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        *,
        relu: bool,
        planar: bool = False,
    ) -> None:
        self.source, self.target, self.relu, self.planar = source, target, relu, planar
        self.reads = (source,)
        self._row = len(kernel) == 1
        one = [1] if self._row else []
        self.settings: tuple[list[int], ...] = (
            [*one, *kernel],
            [*one, *stride],
            [*([0] if self._row else []), *padding],
        )

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for a, b in self.settings]

    def _image(self, values: Values, x: Tensor) -> None:
        rows = x.permute(0, 2, 3, 1).contiguous()
        y, which = native.image_pool(rows, *self._pairs, relu=self.relu, planar=self.planar)
        self._kept = rows, y, which
        values[self.target] = y if self.planar else y.permute(0, 3, 1, 2)

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        x = values[self.source]
        kernel, stride, padding = self.settings
        self._compiled = native.usable(x)
        if self._compiled and not self._row:
            self._image(values, x)
            return
        if self._compiled:
            y, which = native.pool(x.transpose(1, 2).contiguous(), kernel[1], stride[1], padding[1], relu=self.relu)
            self._kept = x, y, which
            values[self.target] = y.transpose(1, 2)
            return
        x = (x.unsqueeze(2) if self._row else x).contiguous(memory_format=torch.channels_last)
        y, index = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding)
        if self.relu:
            y.relu_()
        self._kept = x, y, index
        values[self.target] = y.squeeze(2) if self._row else y

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        dy = grads.take(self.target)
        x, y, index = self._kept
        del self._kept
        if dy is None:
            return
        if self._compiled and not self._row:
            down = (dy if self.planar else dy.permute(0, 2, 3, 1)).contiguous()
            dx = native.image_pool_backward(down, index, x.shape, *self._pairs, planar=self.planar)
            grads.add(self.source, dx.permute(0, 3, 1, 2))
            return
        if self._compiled:
            settings = [part[1] for part in self.settings]
            dx = native.pool_backward(dy.transpose(1, 2).contiguous(), y, index, x.shape[2], settings, relu=self.relu)
            grads.add(self.source, dx.transpose(1, 2))
            return
        dy = dy.unsqueeze(2) if self._row else dy
        if self.relu:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        kernel, stride, padding = self.settings
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, x, kernel, stride, padding, [1, 1], False, index)
        grads.add(self.source, dx.squeeze(2) if self._row else dx)


class FlattenStep(Step):
    """(N, ...) -> (N, all of it)."""

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        self.reads = (source,)

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        x = values[self.source]
        self._shape = x.shape
        values[self.target] = x.flatten(1)

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        dy = grads.take(self.target)
        if dy is not None:
            grads.add(self.source, dy.reshape(self._shape))


class DropoutStep(Step):
    """``nn.Dropout``: the mask of each client is drawn by its own generator, in the order and shape of its sequential update.

    draws: the generators of the clients and how many of the B examples are each client's batch; set before each pass.
    """

    def __init__(self, source: str, target: str, share: float, draws: Draws) -> None:
        self.source, self.target, self.share, self.draws = source, target, share, draws
        self.reads = (source,)

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        x = values[self.source]
        mask = torch.zeros(clients, len(x) // clients, *x.shape[1:], dtype=x.dtype)
        for k, (generator, size) in enumerate(self.draws.of(clients)):
            mask[k, :size] = torch.empty_like(mask[k, :size]).bernoulli_(1 - self.share, generator=generator)
        self._mask = mask.view(x.shape).div_(1 - self.share)
        values[self.target] = x * self._mask

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        dy = grads.take(self.target)
        if dy is not None:
            grads.add(self.source, dy * self._mask)
        del self._mask


class Draws:
    """What random steps draw from: a generator for each client of the stack, and the sizes of their batches."""

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []
        self.sizes: Sequence[int] = ()

    def start(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def of(self, clients: int) -> list[tuple[torch.Generator, int]]:
        return list(zip(self.generators[:clients], self.sizes, strict=True))


class Given(torch.autograd.Function):
    """A scalar whose gradients at ``outputs`` are those given. As the last argument of ``torch.autograd.grad`` they would
    make torch import its symbolic shapes, and with them sympy: a second of every worker's start.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, ones: Tensor) -> Any:  # type: ignore[override]
        return None, *ctx.gradients


class Region(Step):
    """Any operations without parameters, as the model wrote them; autograd goes back through these alone.

    Where nothing ``live`` goes in, no gradient is recorded at all.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], run: Callable[[fx.Node, Mapping[str, Any]], Any], live: frozenset[str]
    ) -> None:
        inside = {n.name for n in nodes}
        self.nodes, self._run = list(nodes), run
        self.reads = tuple(dict.fromkeys(a.name for n in nodes for a in n.all_input_nodes if a.name not in inside))
        self.writes = tuple(n.name for n in nodes if any(u.name not in inside for u in n.users))
        self._sources = [name for name in self.reads if name in live]
        self.live = bool(self._sources)

    def forward(self, values: Values, slots: Slots, clients: int) -> None:
        local = {name: values[name] for name in self.reads}
        self._inputs: dict[str, Tensor] = {}
        for name in self._sources:
            x = local[name]
            if isinstance(x, Tensor) and x.is_floating_point():
                local[name] = self._inputs[name] = x.detach().requires_grad_()
        with torch.set_grad_enabled(bool(self._inputs)):
            for node in self.nodes:
                local[node.name] = self._run(node, local)
        self._outputs: dict[str, Tensor] = {}
        for name in self.writes:
            y = local[name]
            if isinstance(y, Tensor) and y.requires_grad:
                self._outputs[name] = y
                y = y.detach()
            values[name] = y

    def backward(self, grads: Gradients, slots: Slots, clients: int) -> None:
        outputs, towards = [], []
        for name, y in self._outputs.items():
            dy = grads.take(name)
            if dy is not None:
                outputs.append(y)
                towards.append(dy)
        inputs = list(self._inputs.values())
        if outputs and inputs:
            with torch.enable_grad():
                last = Given.apply(towards, *outputs)
            found = torch.autograd.grad(last, inputs, allow_unused=True)
            for name, dx in zip(self._inputs, found, strict=True):
                if dx is not None:
                    grads.add(name, dx)
        self._inputs, self._outputs = {}, {}
