"""From a module to a program: traced with torch.fx, layers by their own backward passes, everything else in regions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from simulations.engine.program.layers import Conv1d, Conv2d, GroupNorm, Layer, Linear
from simulations.engine.program.recurrent import Gru
from simulations.engine.program.slots import Layout
from simulations.engine.program.steps import (
    Draws,
    DropoutStep,
    FlattenStep,
    Gradients,
    LayerStep,
    MaxPoolStep,
    Region,
    ReluStep,
    Slots,
    Step,
    SumStep,
    Values,
)

RELUS = (torch.relu, functional.relu)
POOLS: dict[Any, int] = {functional.max_pool1d: 1, functional.max_pool2d: 2}
SUMS = (operator.add, torch.add)
FACTS = ("dtype", "device", "shape", "ndim", "is_cuda")  # of a parameter, that a forward pass may ask for
RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal_", "rrelu", "gumbel")
MIXING = ("batch_norm", "instance_norm")


class UnsupportedModel(Exception):
    """Why this model cannot be compiled: it is trained another way."""


class Program:
    """One pass over K clients' batches. ``layouts``: the parameters; what the model has beside them never changes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._graph = traced(module)
        self.modules = dict(module.named_modules())
        self._live = self._find_live()
        self.draws = Draws()
        self.steps = self._schedule()
        layers = [step.layer for step in self.steps if isinstance(step, LayerStep)]
        self.layouts: tuple[Layout, ...] = tuple(layout for layer in layers for layout in layer.layouts)
        self.convolves = any(isinstance(layer, Conv2d) for layer in layers)
        self._check_parameters()
        self.inputs = [n.name for n in self._graph.nodes if n.op == "placeholder"]
        (output,) = (n for n in self._graph.nodes if n.op == "output")
        self._outputs = output.args[0]
        self._dead = self._last_uses()

    # running

    def forward(self, inputs: Sequence[Tensor], slots: Slots, clients: int) -> Any:
        """inputs: (K B, ...) each. Returns what the model returns, of the same first dimension."""
        values: Values = dict(zip(self.inputs, inputs, strict=True))
        for step, dead in zip(self.steps, self._dead, strict=True):
            step.forward(values, slots, clients)
            for name in dead:
                del values[name]
        return fx.node.map_arg(self._outputs, lambda node: values[node.name])

    def backward(self, gradients: Sequence[Tensor], slots: Slots, clients: int) -> None:
        """gradients: of each output, in order; every parameter's goes to its slot."""
        grads = Gradients()
        for node, gradient in zip(self.outputs, gradients, strict=True):
            grads.add(node.name, gradient)
        for step in reversed(self.steps):
            step.backward(grads, slots, clients)

    @property
    def outputs(self) -> list[fx.Node]:
        """What the model returns, in order."""
        found: list[fx.Node] = []
        fx.node.map_arg(self._outputs, found.append)
        return found

    def _last_uses(self) -> list[list[str]]:
        kept = {node.name for node in self.outputs}
        last: dict[str, int] = {}
        for number, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.reads, number))
        return [[name for name, at in last.items() if at == n and name not in kept] for n in range(len(self.steps))]

    # compiling

    def _find_live(self) -> frozenset[str]:
        live: set[str] = set()
        for node in self._graph.nodes:
            if self._layer_type(node) is not None or any(a.name in live for a in node.all_input_nodes):
                live.add(node.name)
        return frozenset(live)

    def _layer_type(self, node: fx.Node) -> type[nn.Module] | None:
        if node.op != "call_module":
            return None
        module = self.modules[str(node.target)]
        return type(module) if next(module.parameters(), None) is not None else None

    def _schedule(self) -> list[Step]:
        steps: list[Step] = []
        waiting: list[fx.Node] = []  # for the region that they will be together

        def close() -> None:
            if waiting:
                steps.append(Region(list(waiting), self._run, self._live))
                waiting.clear()

        skipped: set[str] = set()
        for node in self._graph.nodes:
            if node.op in ("placeholder", "output") or node.name in skipped:
                continue
            step = self._known(node, skipped)
            if step is None:
                self._check_opaque(node)
                waiting.append(node)
            else:
                close()
                steps.append(step)
        close()
        return steps

    def _known(self, node: fx.Node, skipped: set[str]) -> Step | None:
        source = node.args[0].name if node.args and isinstance(node.args[0], fx.Node) else ""
        if self._layer_type(node) is not None:
            if len(node.all_input_nodes) != 1 or node.kwargs:
                raise UnsupportedModel(f"{node.target}: a layer with more than one input")
            layer = make_layer(self.modules[str(node.target)], str(node.target))
            if isinstance(layer, Gru):
                return LayerStep(layer, source, self._states(node, skipped), wanted=source in self._live)
            return LayerStep(layer, source, node.name, wanted=source in self._live)
        if source not in self._live:
            return None
        if self._flattens(node):
            return FlattenStep(source, node.name)
        if share := self._dropout(node):
            return DropoutStep(source, node.name, share, self.draws)
        if self._is_relu(node):
            pooled = self._pool_after(node)
            if pooled is not None:
                skipped.add(pooled.name)
                return self._pool(pooled, source, relu=True)
            maker = node.args[0]
            assert isinstance(maker, fx.Node)
            alone = self._layer_type(maker) is not None and len(maker.users) == 1
            return ReluStep(source, node.name, in_place=alone)
        if self._pool_settings(node) is not None:
            return self._pool(node, source, relu=False)
        if node.op == "call_function" and node.target in SUMS and len(node.args) == 2 and not node.kwargs:
            a, b = node.args
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and b.name in self._live:
                return SumStep((a.name, b.name), node.name, self._live)
        return None

    def _states(self, node: fx.Node, skipped: set[str]) -> str:
        """The value that holds all states: a recurrent layer returns them with the last one, which nothing may read."""
        users = list(node.users)
        if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0:
            skipped.add(users[0].name)
            return users[0].name
        items = [u for u in users if u.target is operator.getitem]
        used = [u for u in items if u.users]
        if len(items) == len(users) and len(used) == 1 and used[0].args[1] == 0:
            skipped.update(u.name for u in items)
            return used[0].name
        raise UnsupportedModel(f"{node.target}: its last state is used")

    def _dropout(self, node: fx.Node) -> float:
        """The share that a dropout layer takes out; 0 where this is none, or one that takes all."""
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        return float(module.p) if type(module) is nn.Dropout and not module.inplace and module.p < 1 else 0.0

    @property
    def random(self) -> bool:
        return any(isinstance(step, DropoutStep) for step in self.steps)

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.modules[str(node.target)]) is nn.ReLU
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in RELUS

    def _pool_after(self, node: fx.Node) -> fx.Node | None:
        """The max pooling that alone reads this: the two may change places."""
        users = list(node.users)
        return users[0] if len(users) == 1 and self._pool_settings(users[0]) is not None else None

    def _pool(self, node: fx.Node, source: str, *, relu: bool) -> MaxPoolStep:
        found = self._pool_settings(node)
        assert found is not None
        return MaxPoolStep(source, node.name, *found, relu=relu, planar=all(self._flattens(u) for u in node.users))

    def _flattens(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return node.target in ("flatten", torch.flatten) and node.args[1:] in ((1,), (1, -1)) and not node.kwargs

    def _pool_settings(self, node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
        """(kernel, stride, padding), one number a dimension; None where it is no plain max pooling."""
        if node.op == "call_module":
            m = self.modules[str(node.target)]
            if type(m) not in (nn.MaxPool1d, nn.MaxPool2d):
                return None
            dims, facts = (1 if type(m) is nn.MaxPool1d else 2), dict(vars(m))
        elif node.op == "call_function" and node.target in POOLS:
            dims = POOLS[node.target]
            keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
            facts = {**dict(zip(keys, node.args[1:], strict=False)), **node.kwargs}
        else:
            return None
        if facts.get("ceil_mode") or facts.get("return_indices") or _each(facts.get("dilation", 1), dims) != [1] * dims:
            return None
        kernel = _each(facts["kernel_size"], dims)
        stride = facts.get("stride")
        return kernel, _each(kernel if stride is None else stride, dims), _each(facts.get("padding", 0), dims)

    def _check_opaque(self, node: fx.Node) -> None:
        """Raises UnsupportedModel for what would mix clients, draw at random or use parameters on its own."""
        name = str(getattr(node.target, "__name__", node.target)).lower()
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            name = type(module).__name__.lower()
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0:
                return
            name = {"batchnorm": "batch_norm", "instancenorm": "instance_norm"}.get(name.rstrip("123d"), name)
        if node.op == "get_attr":
            found: Any = self._module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            asked = [u for u in node.users if not (u.target is getattr and u.args[1] in FACTS)]
            if isinstance(found, nn.Parameter) and asked:
                raise UnsupportedModel(f"parameter {node.target} is used outside a layer")
            return
        if any(word in name for word in RANDOM):
            raise UnsupportedModel(f"{node.target}: random in training")
        if any(word in name for word in MIXING):
            raise UnsupportedModel(f"{node.target}: examples of a batch depend on each other")

    def _check_parameters(self) -> None:
        names = [layout.name for layout in self.layouts]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UnsupportedModel(f"{twice[0]} is used more than once")
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            if name in names and not parameter.requires_grad:
                raise UnsupportedModel(f"{name} is frozen")
            if name not in names:
                raise UnsupportedModel(f"{name} is used by no layer, or shared by several")

    def _run(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: values[n.name])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values[n.name])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        found: Any = self._module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found if node.op == "get_attr" else found(*args, **kwargs)


def traced(module: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(module)
    except Exception as error:  # the model's own code, run on proxies: it may fail in any way
        raise UnsupportedModel(f"its forward pass cannot be traced: {str(error).splitlines()[0][:200]}") from None


def make_layer(module: nn.Module, name: str) -> Layer:
    kind: type[nn.Module] = type(module)
    makers: dict[type[nn.Module], Callable[[Any, str], Layer]] = {
        nn.Linear: Linear,
        nn.Conv1d: Conv1d,
        nn.Conv2d: Conv2d,
        nn.GroupNorm: GroupNorm,
        nn.GRU: Gru,
    }
    maker = makers.get(kind)
    fits: Callable[[Any], bool] = getattr(maker, "fits", lambda module: True)
    if maker is None or not fits(module) or module._forward_hooks or module._forward_pre_hooks:
        raise UnsupportedModel(f"{name}: {kind.__name__} has no backward pass of its own here in this form")
    return maker(module, name)


def _each(value: Any, dims: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * dims
