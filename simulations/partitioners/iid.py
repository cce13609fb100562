"""Every client's examples are drawn alike, and about as many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulations.partitioners.base import ClientsOptions, Ids, Units, deal


@dataclass(frozen=True, kw_only=True)
class Options(ClientsOptions):
    pass


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    order = rng.permutation(len(units))
    owner = np.empty(len(units), np.int64)
    owner[order] = deal(order, units.sizes, np.ones(options.clients))
    return owner
