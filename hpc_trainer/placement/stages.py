"""Pipeline parallelism: the layers of a model in stages, one a process, micro-batches one behind the other.

Stages are cut by ``torch.distributed.pipelining``, which traces the model (so that skip connections travel too), between
layers, where the work before and behind is nearest to even; its schedules run them (GPipe: Huang et al. 2019; 1F1B: Narayanan et al. 2019).
Micro-batches are those of gradient accumulation: sums of gradients over them, nothing else changes. All have the same
shape; what is missing in a tail batch is filled with samples that the loss does not see.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd

from fl_core.contracts.errors import ConfigError
from hpc_trainer.layout import Layout
from hpc_trainer.placement.base import Placed, Placement, Table, everyone, group_place

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
Loss = Callable[[Any, int], Tensor]  # (outputs of a micro-batch, its number) -> what is differentiated


def layer_costs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, int]]:
    """(name, multiply-adds) of each call of a layer with parameters, in their order."""
    calls: list[tuple[str, int]] = []
    hooks = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not any(True for _ in module.children()):

            def note(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                if isinstance(module, (nn.Linear, _ConvNd)):
                    places = output.numel() // (output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1])
                    calls.append((name, places * module.weight.numel()))
                else:
                    calls.append((name, output.numel()))

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return calls


def cut_points(costs: list[tuple[str, int]], stages: int) -> list[str]:
    """The layers with which stages 1, 2, ... begin. Raises ConfigError where there are too few layers."""
    names = [name for name, _ in costs]
    usable = [n for n, name in enumerate(names) if names.count(name) == 1]
    if len(usable) < stages:
        raise ConfigError(
            f"pretrain.mesh: {stages} pipeline stages, but the model has {len(usable)} layers that can begin one",
            remedy="use fewer stages",
        )
    before = [0, *itertools.accumulate(cost for _, cost in costs)]
    chosen: list[int] = []
    for stage in range(1, stages):
        first = usable.index(chosen[-1]) + 1 if chosen else 1
        candidates = usable[first : len(usable) - (stages - stage - 1)]  # leaves a layer for each stage to come
        goal = before[-1] * stage / stages
        chosen.append(min(candidates, key=lambda n: abs(before[n] - goal)))
    return [names[n] for n in chosen]


def parameters_of_stages(model: nn.Module, costs: list[tuple[str, int]], points: list[str]) -> list[int]:
    """Elements of the parameters in each stage."""
    found, stage, seen = [0] * (len(points) + 1), 0, set()
    for name, _ in costs:
        stage += stage < len(points) and name == points[stage]
        if name not in seen:
            found[stage] += sum(p.numel() for p in model.get_submodule(name).parameters())
        seen.add(name)
    return found


class Staged(Placement):
    """This process's stage over ``pipeline``; stages alike along the dimensions of samples, whose gradients are summed.

    ``example``: inputs of one micro-batch. The parameters of other stages lose their memory here.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, example: tuple[Tensor, ...], count: int, schedule: str
    ) -> None:
        assert layout.pipeline is not None
        self.group, self.count = layout.pipeline, count
        self.stage_of_pipe = dist.get_rank(self.group)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.size = len(example[0])
        _refuse_shared(model)
        points = cut_points(layer_costs(model, example), dist.get_world_size(self.group))
        model.train()
        training = self._stage(model, example, points, schedule)
        self.schedule = SCHEDULES[schedule](training, count, loss_fn=self._loss, scale_grads=False)
        model.eval()
        scoring = self._stage(model, example, points, schedule)
        model.train()
        stage: nn.Module = training.submod
        _share(stage, scoring.submod)
        self.scoring = ScheduleGPipe(scoring, count)
        self._differentiated: Loss = lambda outputs, number: outputs
        model.to("meta")
        super().__init__(stage, layout)

    def _stage(self, model: nn.Module, example: tuple[Tensor, ...], points: list[str], schedule: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its tracer's future
            try:
                model.forward = functools.partial(_entered, model.forward)  # type: ignore[method-assign]
                pipe = pipeline(model, example, split_spec=dict.fromkeys(points, SplitPoint.BEGINNING))
            except Exception as error:
                raise ConfigError(
                    f"torch cannot trace this model into pipeline stages: {str(error.__cause__ or error).splitlines()[0]}",
                    remedy="train it without a pipeline dimension in pretrain.mesh",
                ) from error
            finally:
                model.__dict__.pop("forward", None)
                for name in points:  # torch leaves its marks on the layers
                    for mark in ("forward", "_orig_forward"):
                        model.get_submodule(name).__dict__.pop(mark, None)
        if schedule == "1f1b" and _reaches_over(pipe):
            raise ConfigError(
                "pretrain.schedule_of_stages = '1f1b': a skip connection reaches over a whole stage, with which torch's schedule waits for ever",
                remedy="set pretrain.schedule_of_stages=gpipe, or use two stages",
            )
        _contiguous_messages(pipe.get_stage_module(self.stage_of_pipe))
        return pipe.build_stage(self.stage_of_pipe, example[0].device, self.group)

    def _wrapped(self) -> nn.Module:
        return self.model

    def _loss(self, outputs: Any, number: Tensor) -> Tensor:
        return self._differentiated(_single(outputs), int(number))

    def run(self, inputs: list[tuple[Tensor, ...]], differentiated: Loss) -> None:
        """Forward and backward passes of all micro-batches, and the sum of gradients over processes with other samples."""
        self._differentiated = differentiated
        last = self.stage_of_pipe == dist.get_world_size(self.group) - 1
        targets: dict[str, Any] = {"target": torch.arange(self.count), "losses": []} if last else {}
        self.schedule.step(*(self._joined(inputs) if self.stage_of_pipe == 0 else ()), return_outputs=False, **targets)
        if self.layout.summed is None:
            return
        sums = []
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(dist.all_reduce(parameter.grad, group=self.layout.summed, async_op=True))
        for work in sums:
            work.wait()

    def outputs(self, inputs: tuple[Tensor, ...], config: Any) -> Any:
        """Of any number of samples up to a step's; on every process of the pipeline."""
        whole = len(inputs[0])
        parts = [tuple(t[i * self.size : (i + 1) * self.size] for t in inputs) for i in range(self.count)]
        found = self.scoring.eval(*(self._joined(parts) if self.stage_of_pipe == 0 else ()))
        box = [None if found is None else tuple(t[:whole].detach().cpu() for t in _several(found))]
        source = dist.get_global_rank(self.group, dist.get_world_size(self.group) - 1)
        dist.broadcast_object_list(box, source, group=self.group)
        device = inputs[0].device
        made = tuple(t.to(device) for t in box[0] or ())
        return made if len(made) > 1 else made[0]

    def _joined(self, inputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Micro-batches of ``size`` samples each, filled up with the first sample."""
        first = inputs[0]
        made = []
        for number in range(len(first)):
            parts = []
            for part in (batch[number] for batch in inputs):
                filling = first[number][:1].expand(self.size - len(part), *part.shape[1:])
                parts.append(torch.cat([part, filling]))
            made.append(torch.cat(parts))
        return tuple(made)

    def clip(self, norm: float) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        squares = nn.utils.get_total_norm(grads) ** 2
        dist.all_reduce(squares, group=self.group)
        nn.utils.clip_grads_with_norm_(self.parameters(), norm, squares.sqrt())

    def arrays(self) -> Table:
        return self._of_all_stages(super().arrays())

    def gradients(self) -> Table:
        return self._of_all_stages(super().gradients())

    def placed(self, tensor: Tensor, parameter: Tensor | None) -> Placed:
        return Placed.uncut(tensor, everyone() if parameter is None else group_place(self.layout.summed))

    def number_in_model(self, number: int) -> int:
        return self._numbers()[number]

    def number_here(self, number: int) -> int | None:
        numbers = self._numbers()
        return numbers.index(number) if number in numbers else None

    def _numbers(self) -> list[int]:
        """In the whole model, of each parameter of this stage."""
        return [self.names.index(name) for name, p in self.model.named_parameters() if p.requires_grad]

    def _of_all_stages(self, table: Table) -> Table:
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, table, group=self.group)
        merged = {name: value for part in parts for name, value in part.items()}
        order = {name: n for n, name in enumerate(self.names)}
        return dict(sorted(merged.items(), key=lambda item: order.get(item[0], len(order))))


def _entered(forward: Callable[..., Any], *inputs: Tensor) -> Any:
    """Every input enters in the first stage, in order; torch takes stage 0 to use just the model's inputs, and no other stage any."""
    return forward(*(x.clone() for x in inputs))


def _reaches_over(pipe: Any) -> bool:
    """Whether an output of a stage is used by another one than the next."""
    stages = [node for node in pipe.split_gm.graph.nodes if node.op == "call_module"]
    for number, node in enumerate(stages):
        for user in node.users:
            users = [user] if user in stages else list(user.users)  # a getitem between them
            if any(other in stages and stages.index(other) > number + 1 for other in users):
                return True
    return False


class _Through(torch.autograd.Function):
    """The tensor itself; its gradient is contiguous, as messages must be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].contiguous()


def _through(x: Tensor) -> Tensor:
    made: Tensor = _Through.apply(x) if x.requires_grad else x
    return made


def _contiguous_messages(stage: Any) -> None:
    """torch sends activations with the strides that they happened to have when they were traced; gloo takes none but plain ones."""
    graph = stage.graph

    def plain(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
        made = graph.call_function(function, (node,))
        made.meta = {**node.meta, "val": node.meta["val"].contiguous()}
        return made

    for node in list(graph.nodes):
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            node.meta["val"] = node.meta["val"].contiguous()
            with graph.inserting_after(node):
                made = plain(node, _through)
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        elif node.op == "output":
            with graph.inserting_before(node):
                node.args = map_arg(node.args, lambda n: plain(n, Tensor.contiguous))
    stage.recompile()


def _refuse_shared(model: nn.Module) -> None:
    if len(list(model.parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        raise ConfigError("layers that share parameters may lie in different pipeline stages: not supported")


def _share(stage: nn.Module, other: nn.Module) -> None:
    """The other stage's parameters and buffers become the very ones of the first."""
    for found, store in ((dict(stage.named_parameters()), "_parameters"), (dict(stage.named_buffers()), "_buffers")):
        for name, value in found.items():
            owner, _, attribute = name.rpartition(".")
            getattr(other.get_submodule(owner), store)[attribute] = value


def _single(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
