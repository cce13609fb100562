"""Feature shift: clients hold different parts of the input space, along the direction in which inputs differ most.

Units are ordered by their first principal component and dealt out in runs; ``strength`` mixes that order with chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl_core.contracts.config import number
from simulations.partitioners.base import ClientsOptions, Ids, Units, deal

ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class Options(ClientsOptions):
    strength: float = number(1.0, low=0.0, high=1.0, help="0 = IID, 1 = sorted")


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    ranks = np.argsort(np.argsort(principal(units.features(), rng), kind="stable"), kind="stable") / max(1, len(units))
    keys = options.strength * ranks + (1 - options.strength) * rng.random(len(units))
    order = np.argsort(keys, kind="stable")
    owner = np.empty(len(units), np.int64)
    owner[order] = rng.permutation(options.clients)[deal(order, units.sizes, np.ones(options.clients))]
    return owner


def principal(x: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """(U,) coordinates along the first principal component, by power iteration."""
    centred = x - x.mean(axis=0)
    direction = rng.normal(size=x.shape[1])
    for _ in range(ITERATIONS):
        direction = centred.T @ (centred @ direction)
        length = float(np.linalg.norm(direction))
        if length == 0:
            break
        direction /= length
    found: npt.NDArray[np.float64] = centred @ direction
    return found
