"""Optimiser state as plain arrays for safetensors: no pickle in a checkpoint.

``optimizer/INDEX/NAME`` is a tensor of parameter number INDEX, ``optimizer/INDEX/NAME/K`` entry K of a list of them, and
``optimizer/INDEX/number/NAME`` a plain number; ``optimizer/group/G/NAME`` is a number that group G counts by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fl_core.contracts.arrays import Arrays

Whole = Callable[[torch.Tensor, torch.Tensor], npt.NDArray[Any]]
Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PREFIX = "optimizer/"
COUNTERS = ("step",)  # what optimisers change in their groups; the rest of a group is configuration


def save(optimizer: torch.optim.Optimizer, whole: Whole | None = None) -> dict[str, npt.NDArray[Any]]:
    """To be called by every rank: an optimiser that spreads its state gathers it here.

    whole(state, parameter): the whole array of which this process has a part, for state of the parameter's own shape.
    """
    parameters = _parameters(optimizer)
    table: dict[str, npt.NDArray[Any]] = {}
    document = optimizer.state_dict()
    for index, entries in document["state"].items():
        for name, value in entries.items():
            if isinstance(value, (list, tuple)):
                for place, item in enumerate(value):
                    table[f"{PREFIX}{index}/{name}/{place}"] = _array(item)
            elif torch.is_tensor(value):
                parameter = parameters.get(index)
                cut = whole is not None and parameter is not None and value.shape == parameter.shape
                table[f"{PREFIX}{index}/{name}"] = whole(value, parameter) if cut else _array(value)  # type: ignore[misc, arg-type]
            elif value is not None:
                table[f"{PREFIX}{index}/number/{name}"] = np.asarray(value)
    for number, group in enumerate(document["param_groups"]):
        for name in COUNTERS:
            if name in group:
                table[f"{PREFIX}group/{number}/{name}"] = np.asarray(group[name])
    return table


def load(optimizer: torch.optim.Optimizer, table: Arrays, part: Part | None = None) -> None:
    """part(whole, parameter): what this process keeps of a whole array of the parameter's shape."""
    parameters = _parameters(optimizer)
    states: dict[int, dict[str, Any]] = {}
    groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
    for key in sorted((k for k in table if k.startswith(PREFIX)), key=_order):
        value = table[key]
        match key.removeprefix(PREFIX).split("/"):
            case ["group", number, name]:
                groups[int(number)][name] = value.item()
            case [index, "number", name]:
                states.setdefault(int(index), {})[name] = value.item()
            case [index, name]:
                tensor = torch.from_numpy(np.array(value))
                if part is not None and name not in COUNTERS and int(index) in parameters:
                    tensor = part(tensor, parameters[int(index)])
                states.setdefault(int(index), {})[name] = tensor
            case [index, name, _]:
                states.setdefault(int(index), {}).setdefault(name, []).append(torch.from_numpy(np.array(value)))
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _parameters(optimizer: torch.optim.Optimizer) -> dict[Any, torch.Tensor]:
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def _array(item: Any) -> npt.NDArray[Any]:
    """An empty list stands for a dimension that is not preconditioned (SOAP)."""
    return np.asarray(item.detach().cpu() if torch.is_tensor(item) else np.zeros(0, np.float32))


def _order(key: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in key.split("/"))
