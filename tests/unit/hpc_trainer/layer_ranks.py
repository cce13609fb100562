"""One rank of the layer-by-layer comparison of cut volumes and cut layers with whole ones.

Each process computes the whole by itself and its rows together with the others; outputs, input and parameter gradients are
held against each other in float64.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fl_core.contracts.errors import ConfigError
from fl_core.learning.normalization import GhostBatchNorm
from hpc_trainer.placement.channels import cut_of, split_channels
from hpc_trainer.processes import Processes
from hpc_trainer.spatial import split_space, whole
from hpc_trainer.spatial.exchange import Split, rows
from hpc_trainer.spatial.part import Part


def _kernel(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 4 * 4 * 27, dtype=x.dtype).view(4, 4, 3, 3, 3)


class Apply(nn.Module):
    """A function of cut tensors, behind a convolution so that there is a parameter."""

    def __init__(self, channels: int, function: Callable[[Tensor], Tensor], dims: int = 3) -> None:
        super().__init__()
        self.first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](channels, channels, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def convolutions() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for kernel, stride, dilation, padding in [
        *(
            (1, 1, 1, 0),
            (3, 1, 1, 1),
            (3, 2, 1, 1),
            (2, 2, 1, 0),
            (5, 1, 2, 4),
            (4, 3, 1, 2),
            (3, 1, 1, 0),
            (7, 1, 1, 3),
        ),
        *((2, 1, 1, 1), (1, 2, 1, 0), (5, 4, 1, 0)),
    ]:
        made = nn.Conv3d(2, 3, kernel, stride, padding, dilation)
        found[f"conv3d k{kernel} s{stride} d{dilation} p{padding}"] = made, (2, 2, 13, 9, 9)
    found["conv3d groups, other strides"] = (
        nn.Conv3d(4, 4, (3, 1, 3), (2, 1, 2), (1, 0, 1), groups=2, bias=False),
        (1, 4, 9, 4, 5),
    )
    found["conv3d same"] = nn.Conv3d(2, 2, (4, 3, 2), padding="same"), (1, 2, 7, 6, 5)
    found["conv2d"] = nn.Conv2d(3, 2, 3, padding=1), (2, 3, 8, 5)
    found["conv1d causal"] = nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(2, 2, 3, dilation=2)), (2, 2, 11)
    for kernel, stride, dilation, padding, extra in [
        *(
            (2, 2, 1, 0, 0),
            (3, 2, 1, 1, 1),
            (3, 1, 1, 1, 0),
            (4, 2, 1, 1, 0),
            (3, 2, 2, 2, 1),
            (2, 3, 1, 0, 0),
            (1, 2, 1, 0, 1),
        ),
        (5, 2, 1, 0, 0),
    ]:
        made = nn.ConvTranspose3d(2, 3, kernel, stride, padding, extra, dilation=dilation)
        found[f"transposed k{kernel} s{stride} d{dilation} p{padding} o{extra}"] = made, (2, 2, 7, 4, 4)
    return found


def cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    box = (2, 4, 11, 6, 5)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "mean over all axes": lambda x: x * x.mean(dim=(2, 3, 4), keepdim=True),
        "mean over other axes": lambda x: x * x.mean(dim=(1, 3), keepdim=True) + x.sum(4).unsqueeze(-1),
        "amax": lambda x: x + x.relu().amax(dim=(2, 3, 4), keepdim=True),
        "amin over channels": lambda x: x + x.amin(1, keepdim=True),
        "whole beside cut": lambda x: (
            x * torch.arange(11.0, dtype=x.dtype).view(-1, 1, 1) + torch.ones(x.shape, dtype=x.dtype)
        ),
        "uneven cuts meet": lambda x: torch.cat(
            [x, functional.interpolate(functional.max_pool3d(x, 2), size=x.shape[2:])], 1
        ),
        "ranges of the cut axis": lambda x: x[:, :2, 2:-3] * x[:, 2:, 1:-4],
        "one row": lambda x: x + x[:, :, -2].unsqueeze(2) * x[:, :, 1:2].sum(2, keepdim=True),
        "first rows only": lambda x: functional.pad(x[:, :, :3], (0, 0, 0, 0, 1, 2)),
        "transposed, flattened": lambda x: x.transpose(1, 3).flatten(3).permute(0, 2, 1, 3).reshape(2, 11, 6, 20),
        "softmax": lambda x: torch.log_softmax(x, 1) + x.softmax(dim=-1),
        "in place": lambda x: x.clone().mul_(2.0).add_(x).relu_(),
        "changed in place behind a layer": lambda x: (
            functional.conv3d(x.relu(), _kernel(x), padding=1).mul_(2.0) + x.clone().add_(1.0)
        ),
        "stack, split": lambda x: torch.stack(x.split(2, dim=1), 0).sum(0) + torch.stack(x.chunk(2, 1), -1)[..., 0],
        "expand": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1, -1),
        "matrix of each fibre": lambda x: functional.linear(x, torch.ones(3, 5, dtype=x.dtype)),
        "instance norm": lambda x: functional.instance_norm(x),
        "adaptive": lambda x: (
            functional.adaptive_avg_pool3d(x, 1).flatten(1) + functional.adaptive_max_pool3d(x, 1).flatten(1)
        ),
        "half of it": lambda x: torch.where(x > 0, x, 0.1 * x).clamp(-1, 1) ** 2 / (1 + x.abs()) - (1 - x),
    }
    found = {name: (Apply(4, function), box) for name, function in functions.items()}
    for mode, options in {
        "nearest": {},
        "trilinear": {},
        "trilinear, corners": {"align_corners": True},
    }.items():
        for factor in (2.0, 1.5, 0.5):
            layer = nn.Upsample(scale_factor=factor, mode=mode.partition(",")[0], **options)
            found[f"{mode} {factor}"] = nn.Sequential(nn.Conv3d(4, 4, 1), layer), box
    layers: dict[str, nn.Module] = {
        "max pool": nn.MaxPool3d(3, 2, 1),
        "max pool dilated": nn.MaxPool3d(2, 1, 0, 2),
        "average pool": nn.AvgPool3d(3, 2, 1),
        "average pool 2": nn.AvgPool3d(2, 1),
        "group norm": nn.GroupNorm(2, 4),
        "layer norm": nn.LayerNorm([6, 5]),
        "batch norm": nn.BatchNorm3d(4),
        "ghost norm": GhostBatchNorm(4),
        "activations": nn.Sequential(
            nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.PReLU(), nn.Dropout(0.0)
        ),
    }
    for name, layer in layers.items():
        found[name] = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), layer), box
    narrow = nn.Sequential(
        nn.Conv3d(1, 2, 3, padding=1), nn.MaxPool3d(2), nn.BatchNorm3d(2), nn.Conv3d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4),
        nn.Conv3d(4, 4, 3, padding=1), nn.ConvTranspose3d(4, 2, 2, 2), nn.MaxPool3d(3, 1, 1), nn.Upsample(scale_factor=2.0),
    )  # fmt: skip
    found["fewer rows than processes"] = narrow, (2, 1, 4, 8, 8)
    return {**convolutions(), **found}


def compared(model: nn.Module, shape: tuple[int, ...], group: Any) -> float:
    """The largest deviation, relative to the largest value of its kind."""
    size = dist.get_world_size(group)
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(model)
    expected = twin(x)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    split_space(model, group)
    again = x.detach().clone().requires_grad_()
    found = model(again)
    ((found * weight).sum() / size).backward()
    grads = [again.grad, *(p.grad for p in model.parameters())]
    assert all(isinstance(g, Tensor) for g in grads)
    for grad in grads:
        dist.all_reduce(grad, group=group)  # type: ignore[arg-type]
    pairs = [(whole(found), expected), *zip(grads, [x.grad, *(p.grad for p in twin.parameters())], strict=True)]
    pairs += list(zip(model.buffers(), twin.buffers(), strict=True))  # type: ignore[arg-type]
    worst = 0.0
    for a, b in pairs:
        assert a is not None
        assert b is not None
        assert a.shape == b.shape, (a.shape, b.shape)
        worst = max(worst, float((a - b).abs().max()) / max(1.0, float(b.abs().max())))
    return worst


def cut_layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """For tensor parallelism."""
    box = (2, 4, 5, 4, 3)
    return {
        "linear": (nn.Linear(3, 7), (2, 5, 3)),
        "linear pair": (
            nn.Sequential(nn.Linear(3, 12), nn.GELU(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)),
            (4, 3),
        ),
        "conv1d": (nn.Conv1d(3, 5, 3, padding=1), (2, 3, 7)),
        "conv2d": (nn.Conv2d(3, 9, 3, stride=2), (2, 3, 7, 7)),
        "conv3d": (nn.Conv3d(4, 6, 3, padding=1, bias=False), box),
        "transposed": (nn.ConvTranspose3d(4, 6, 2, stride=2), box),
        "grouped": (nn.Conv3d(4, 8, 3, groups=4), box),
        "grouped, not by processes": (nn.Sequential(nn.Conv3d(4, 15, 1), nn.Conv3d(15, 10, 3, groups=5)), box),
        "grouped, transposed": (nn.ConvTranspose3d(4, 8, 3, groups=4), box),
        "fewer channels than processes": (nn.Conv3d(4, 1, 1), box),
        "pair, group norm": (
            nn.Sequential(nn.Conv3d(4, 24, 3), nn.GroupNorm(12, 24), nn.ReLU(), nn.Conv3d(24, 4, 1)),
            box,
        ),
        "pair, group norm of one group": (
            nn.Sequential(nn.Conv3d(4, 24, 3), nn.GroupNorm(1, 24), nn.Conv3d(24, 4, 1)),
            box,
        ),
        "pair, pooling": (
            nn.Sequential(nn.Conv3d(4, 12, 3, padding=1), nn.MaxPool3d(2), nn.ConvTranspose3d(12, 4, 2, 2)),
            box,
        ),
        "pair, transposed": (
            nn.Sequential(nn.ConvTranspose3d(4, 12, 2), nn.SiLU(), nn.Conv3d(12, 4, 2, bias=False)),
            box,
        ),
        "pair, batch norm": (
            nn.Sequential(
                nn.Conv3d(4, 12, 3), nn.BatchNorm3d(12), nn.ReLU(inplace=True), nn.Conv3d(12, 4, 1), nn.Conv3d(4, 4, 1)
            ),
            box,
        ),
    }


def compared_channels(model: nn.Module, shape: tuple[int, ...], group: Any) -> float:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    twin = copy.deepcopy(model)
    expected = twin(x)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    found = split_channels(model, group)(again)
    (found * weight).sum().backward()
    pairs = [(found, expected), (again.grad, x.grad)]
    for mine, other in [
        *zip(model.parameters(), twin.parameters(), strict=True),
        *zip(model.buffers(), twin.buffers(), strict=True),
    ]:
        cut = cut_of(mine)
        pairs.append((mine, other if cut is None else cut.of(other)))
        if other.grad is not None:
            pairs.append((mine.grad, other.grad if cut is None else cut.of(other.grad)))
    worst = 0.0
    for a, b in pairs:
        assert a is not None
        assert b is not None
        assert a.shape == b.shape, (a.shape, b.shape)
        worst = max(worst, float((a - b).abs().max()) / max(1.0, float(b.abs().max())))
    return worst


def random_rows(draws: int) -> float:
    """Any cut to any ranges, overlapping and outside; and the adjoint: <rows(x), y> = <x, rows'(y)>, over all processes."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    generator, worst = torch.Generator().manual_seed(2), 0.0

    def number(high: int) -> int:
        return int(torch.randint(high + 1, (), generator=generator))

    for _ in range(draws):
        extent = 1 + number(9)
        split = Split(-2, (0, *sorted(number(extent) for _ in range(size - 1)), extent), rank, group)
        wanted = [(first, first + number(6)) for first in (number(extent + 4) - 4 for _ in range(size))]
        x = torch.randn(2, extent, 3, generator=generator, dtype=torch.float64)
        padded = functional.pad(x, (0, 0, 10, 20), value=7.0)
        mine = x[:, split.mine[0] : split.mine[1]].clone().requires_grad_()
        found = rows(mine, split, wanted, 7.0)
        worst = max(worst, float((found - padded[:, 10 + wanted[rank][0] : 10 + wanted[rank][1]]).abs().sum()))
        y = torch.randn(found.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        inside = (rows(mine, split, wanted, 0.0) * y).sum()
        inside.backward()
        assert mine.grad is not None
        both = torch.stack([inside.detach(), (mine * mine.grad).sum().detach()])
        dist.all_reduce(both)
        worst = max(worst, float((both[0] - both[1]).abs()))
    return worst


def refused() -> dict[str, str]:
    """What cannot be computed in parts says so, and where."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "flatten": lambda x: x.flatten(1),
        "cumsum": lambda x: x.cumsum(2),
        "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
        "cat": lambda x: torch.cat([x, x], 2),
        "reflect": lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1), mode="reflect"),
        "dropout": lambda x: functional.dropout(x, 0.5),
        "matmul": lambda x: x @ x.transpose(3, 4),
        "index": lambda x: x[:, :, [0, 1]],
    }
    said = {}
    for name, function in functions.items():
        model = nn.Sequential(nn.Conv3d(2, 2, 1), Apply(2, function)).double()
        split_space(model, dist.group.WORLD)  # type: ignore[arg-type]
        try:
            made = model(torch.randn(1, 2, 8, 4, 4, dtype=torch.float64))
            said[name] = f"not refused: {type(made)} {isinstance(made, Part)}"
        except ConfigError as error:
            said[name] = error.message
    return said


def compare_all(processes: Processes, out: Path) -> None:
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    channels: dict[str, float] = {}
    for made, compare, table in ((cases(), compared, found), (cut_layers(), compared_channels, channels)):
        for name, (model, shape) in made.items():
            try:
                table[name] = compare(model.double(), shape, dist.group.WORLD)
            except Exception as error:
                raise RuntimeError(name) from error
    document = {"deviations": found, "channels": channels, "refused": refused(), "rows": random_rows(60)}
    if processes.is_main:
        out.write_text(json.dumps(document))
