"""Quantity skew: examples drawn alike, clients' shares of them by Dirichlet(alpha) (Li et al., ICDE 2022, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_core.contracts.config import number
from simulations.partitioners.base import ClientsOptions, Ids, Units, deal


@dataclass(frozen=True, kw_only=True)
class Options(ClientsOptions):
    """alpha: small = a few clients have nearly all."""

    alpha: float = number(0.5, low=1e-3, high=1e6)


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    order = rng.permutation(len(units))
    shares = rng.dirichlet(np.full(options.clients, options.alpha))
    owner = np.empty(len(units), np.int64)
    owner[order] = deal(order, units.sizes, np.maximum(shares, 1e-12))
    return owner
