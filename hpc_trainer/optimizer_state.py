"""Optimiser state as plain arrays for safetensors: no pickle in a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fl_core.contracts.arrays import Arrays


def save(optimizer: torch.optim.Optimizer) -> dict[str, npt.NDArray[Any]]:
    """``optimizer/INDEX/NAME`` -> array; everything else is in the configuration."""
    table = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if value is not None:
                table[f"optimizer/{index}/{name}"] = np.asarray(
                    value.detach().cpu() if torch.is_tensor(value) else value
                )
    return table


def load(optimizer: torch.optim.Optimizer, table: Arrays) -> None:
    states: dict[int, dict[str, Any]] = {}
    for key, value in table.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            states.setdefault(int(index), {})[name] = torch.from_numpy(np.array(value))
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
