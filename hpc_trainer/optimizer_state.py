"""Optimiser state as plain arrays for safetensors: no pickle in a checkpoint.

``optimizer/INDEX/NAME`` is a tensor of parameter number INDEX, ``optimizer/INDEX/NAME/K`` entry K of a list of them, and
``optimizer/INDEX/number/NAME`` a plain number; ``optimizer/group/G/NAME`` is a number that group G counts by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PREFIX = "optimizer/"
COUNTERS = ("step",)  # what optimisers change in their groups; the rest of a group is configuration


class Entry(NamedTuple):
    """parameter: whose state it is; None for what belongs to all of them."""

    key: str
    value: Tensor
    parameter: Tensor | None


def entries(optimizer: torch.optim.Optimizer) -> Iterator[Entry]:
    """To be called by every rank: an optimiser that spreads its state gathers it here."""
    parameters = numbered(optimizer)
    document = optimizer.state_dict()
    for index, state in document["state"].items():
        for name, value in state.items():
            if isinstance(value, (list, tuple)):
                for place, item in enumerate(value):
                    yield Entry(f"{PREFIX}{index}/{name}/{place}", _tensor(item), parameters.get(index))
            elif torch.is_tensor(value):
                yield Entry(f"{PREFIX}{index}/{name}", value, parameters.get(index))
            elif value is not None:
                yield Entry(f"{PREFIX}{index}/number/{name}", _tensor(np.asarray(value)), parameters.get(index))
    for number, group in enumerate(document["param_groups"]):
        for name in COUNTERS:
            if name in group:
                yield Entry(f"{PREFIX}group/{number}/{name}", _tensor(np.asarray(group[name])), None)


def save(optimizer: torch.optim.Optimizer) -> dict[str, npt.NDArray[Any]]:
    """Of an optimiser whose parameters are whole here."""
    return {entry.key: np.array(entry.value.detach().cpu().numpy()) for entry in entries(optimizer)}


def load(optimizer: torch.optim.Optimizer, table: Mapping[str, Any]) -> None:
    """``table``: arrays by key, or tensors cut as their parameters are."""
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
                states.setdefault(int(index), {})[name] = _tensor(value)
            case [index, name, _]:
                states.setdefault(int(index), {}).setdefault(name, []).append(_tensor(value))
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def numbered(optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
    """Parameters by the number that keys call them."""
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def number_of(key: str) -> int | None:
    """The parameter's number in a key; None: it belongs to no parameter."""
    head = key.split("/")[1]
    return int(head) if head.isdigit() else None


def renumbered(key: str, number: int) -> str:
    prefix, _, *rest = key.split("/")
    return "/".join([prefix, str(number), *rest])


def _tensor(item: Any) -> Tensor:
    """An empty list stands for a dimension that is not preconditioned (SOAP)."""
    if torch.is_tensor(item):
        return item
    return torch.from_numpy(np.array(item)) if isinstance(item, np.ndarray) else torch.zeros(0)


def _order(key: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in key.split("/"))
