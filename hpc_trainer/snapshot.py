"""A training's state as pieces of arrays: each process gives what it holds, and takes what it needs, whatever wrote it.

Model, optimiser and running average lie in a checkpoint as ``model/NAME``, ``optimizer/...`` (numbered as in the whole model) and
``average/...``. Of values that several processes hold alike one gives them: whoever has given fewest bytes so far. Nothing is
gathered, so that no process needs more memory than a copy of its part.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_core.contracts.checkpoint import MODEL_PREFIX
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.shards import Piece, ShardReader
from fl_core.learning.averaging import COUNT, SUMS, ModelAverage
from hpc_trainer import optimizer_state
from hpc_trainer.placement.base import Placed, Placement, everyone


class Pieces:
    """Collects copies of this process's share of what it holds."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._given: dict[int, list[int]] = {}  # number of holders -> bytes that each gave: all of them count alike

    def add(self, name: str, values: Tensor | npt.NDArray[np.generic], placed: Placed) -> None:
        size = values.nbytes
        given = self._given.setdefault(placed.copies, [0] * placed.copies)
        giver = given.index(min(given))
        given[giver] += size
        if giver == placed.copy and (size or not all(placed.shape)):
            array = np.array(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)
            self.pieces.append(Piece(name=name, shape=placed.shape, offset=placed.offset, array=array))


def local_arrays(placement: Placement) -> dict[str, npt.NDArray[np.generic]]:
    """What this process holds of the model, by name; copies."""
    held = placement.model.state_dict(keep_vars=True)
    return {name: np.array(placement.local(tensor).cpu().numpy()) for name, tensor in held.items()}


def set_local_arrays(placement: Placement, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    with torch.no_grad():
        for name, tensor in placement.model.state_dict(keep_vars=True).items():
            placement.local(tensor).copy_(torch.from_numpy(np.array(arrays[name])))


def of_model(placement: Placement) -> Pieces:
    found = Pieces()
    for name, tensor in placement.model.state_dict(keep_vars=True).items():
        found.add(MODEL_PREFIX + name, placement.local(tensor), placement.placed(tensor, tensor))
    return found


def of_training(placement: Placement, optimizer: torch.optim.Optimizer, average: ModelAverage) -> list[Piece]:
    """Everything that a run needs to go on; to be called by every process."""
    found = of_model(placement)
    for key, value, parameter in optimizer_state.entries(optimizer):
        number = optimizer_state.number_of(key)
        if number is not None:
            key = optimizer_state.renumbered(key, placement.number_in_model(number))
        found.add(key, placement.local(value), placement.placed(value, parameter))
    held = placement.model.state_dict(keep_vars=True)
    for name, values in average.save().items():
        tensor = held.get(name.removeprefix(SUMS)) if name.startswith(SUMS) else None
        uncut = Placed.uncut(torch.from_numpy(np.asarray(values)), everyone())
        found.add(name, np.asarray(values), uncut if tensor is None else placement.placed(tensor, tensor))
    return found.pieces


def restore(shards: ShardReader, placement: Placement, optimizer: torch.optim.Optimizer, average: ModelAverage) -> None:
    """Takes this process's part of each array. Raises IntegrityError naming the array that does not fit."""
    averaged: dict[str, npt.NDArray[np.generic]] = {}
    for name, tensor in placement.model.state_dict(keep_vars=True).items():
        here = placement.local(tensor)
        region = _region(shards, MODEL_PREFIX + name, placement.placed(tensor, tensor), here)
        values = torch.from_numpy(region)
        if values.dtype != here.dtype or (values.is_floating_point() and not bool(values.isfinite().all())):
            raise IntegrityError(
                f"{shards.folder}: array {name!r} is {values.dtype}, or holds values that are not finite"
            )
        with torch.no_grad():
            here.copy_(values)
        if SUMS + name in shards.shapes:
            averaged[SUMS + name] = _region(shards, SUMS + name, placement.placed(tensor, tensor), here)
    optimizer_state.load(optimizer, _optimizer_table(shards, placement, optimizer))
    average.load({**averaged, COUNT: shards.read(COUNT)})


def _optimizer_table(
    shards: ShardReader, placement: Placement, optimizer: torch.optim.Optimizer
) -> dict[str, npt.NDArray[np.generic] | Tensor]:
    parameters = optimizer_state.numbered(optimizer)
    table: dict[str, npt.NDArray[np.generic] | Tensor] = {}
    for key in shards.names(optimizer_state.PREFIX):
        number = optimizer_state.number_of(key)
        if number is None:
            table[key] = shards.read(key)
            continue
        here = placement.number_here(number)
        if here is None:
            continue
        parameter, name = parameters[here], optimizer_state.renumbered(key, here)
        placed = placement.placed(parameter, parameter)
        if shards.shapes[key] != placed.shape:
            table[name] = shards.read(key)
            continue
        values = torch.from_numpy(_region(shards, key, placed, placement.local(parameter)))
        table[name] = placement.like(values, parameter)
    return table


def _region(shards: ShardReader, name: str, placed: Placed, here: Tensor) -> npt.NDArray[np.generic]:
    if shards.shapes.get(name) != placed.shape:
        raise IntegrityError(f"{shards.folder}: array {name!r} is {shards.shapes.get(name)}, expected {placed.shape}")
    return shards.read(name, placed.offset, tuple(here.shape))
