"""The symmetries of the cube: a turned or mirrored problem has the turned or mirrored design. Torch-free."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation.config import Config
from fl_core.learning import seeding
from fl_core.learning.augmentation import Augmentation

Field = npt.NDArray[Any]
Keys = npt.NDArray[np.uint64]
Symmetry = tuple[tuple[int, ...], tuple[int, ...]]  # new axis a is old axis order[a], turned round where sign[a] = -1
VOIGT = ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2))
SIGNS = tuple(itertools.product((1, -1), repeat=3))
GROUPS: dict[str, tuple[Symmetry, ...]] = {
    "none": (((0, 1, 2), (1, 1, 1)),),
    "mirror": (((0, 1, 2), (1, 1, 1)), ((0, 1, 2), (1, -1, 1))),  # walls stay at x = 0, the ground at z = 0
    "upright": tuple(
        (order, sign) for order in ((0, 1, 2), (1, 0, 2)) for sign in SIGNS if sign[2] > 0
    ),  # on the ground
    "cube": tuple(itertools.product(itertools.permutations(range(3)), SIGNS)),
}


def moved(field: Field, symmetry: Symmetry) -> Field:
    """The last three axes turned and mirrored."""
    order, sign = symmetry
    lead = field.ndim - 3
    turned = field.transpose(*range(lead), *(lead + a for a in order))
    found: Field = np.flip(turned, tuple(lead + a for a in range(3) if sign[a] < 0))
    return found


def moved_vector(field: Field, symmetry: Symmetry, *, signed: bool = True) -> Field:
    """(3, ...): components too; ``signed`` False for what has no direction, such as held or not."""
    order, sign = symmetry
    found = moved(field[list(order)], symmetry).copy()
    if signed:
        found *= np.array(sign, found.dtype).reshape(3, 1, 1, 1)
    return found


def moved_strains(field: Field, symmetry: Symmetry) -> Field:
    """(6, ...) in Voigt order."""
    order, sign = symmetry
    place = {pair: i for i, pair in enumerate(VOIGT)}
    from_row = [place[(min(order[a], order[b]), max(order[a], order[b]))] for a, b in VOIGT]
    signs = np.array([sign[a] * sign[b] for a, b in VOIGT], field.dtype)
    found: Field = moved(field[from_row], symmetry) * signs.reshape(6, 1, 1, 1)
    return found


def chosen(seeds: Keys, config: Config) -> list[Symmetry]:
    group = GROUPS[config.data.symmetry]
    return [group[int(u * len(group))] for u in seeding.uniform(seeds, 0)]


def inputs(inputs: dict[str, Field], seeds: Keys, config: Any) -> dict[str, Field]:
    symmetries = chosen(seeds, config)
    found = dict(inputs)
    found["force"] = _each(moved_vector, inputs["force"], symmetries)
    found["fixed"] = _each(lambda f, s: moved_vector(f, s, signed=False), inputs["fixed"], symmetries)
    if "response" in inputs:
        found["response"] = _each(_moved_response, inputs["response"], symmetries)
    return found


def _moved_response(response: Field, symmetry: Symmetry) -> Field:
    return np.concatenate([moved(response[:1], symmetry), moved_strains(response[1:], symmetry)])


def targets(targets: Field, seeds: Keys, config: Any) -> Field:
    """Densities alone, or packed with the problem (pipeline)."""
    symmetries = chosen(seeds, config)
    if targets.ndim == 4:
        return _each(moved, targets, symmetries)
    return _each(_moved_packed, targets, symmetries)


def _moved_packed(packed: Field, symmetry: Symmetry) -> Field:
    found = np.zeros_like(packed)
    found[0, :-1, :-1, :-1] = moved(packed[0, :-1, :-1, :-1], symmetry)
    found[1:4] = moved_vector(packed[1:4], symmetry)
    found[4:7] = moved_vector(packed[4:7], symmetry, signed=False)
    return found


def _each(move: Any, fields: Field, symmetries: list[Symmetry]) -> Field:
    if not len(fields):
        return np.array(fields)
    return np.stack([move(np.asarray(f), s) for f, s in zip(fields, symmetries, strict=True)])


AUGMENTATION = Augmentation(inputs=inputs, targets=targets)
