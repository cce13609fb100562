"""Label skew: each label is shared out by a draw from Dirichlet(alpha) (Yurochkin et al., ICML 2019; Hsu et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_core.contracts.config import number
from simulations.partitioners.base import ClientsOptions, Ids, Units, deal


@dataclass(frozen=True, kw_only=True)
class Options(ClientsOptions):
    """alpha: small = each client has few labels, large = all alike."""

    alpha: float = number(0.5, low=1e-3, high=1e6)


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    owner = np.empty(len(units), np.int64)
    for label in np.unique(units.labels):
        order = rng.permutation(np.flatnonzero(units.labels == label))
        shares = rng.dirichlet(np.full(options.clients, options.alpha))
        owner[order] = deal(order, units.sizes, np.maximum(shares, 1e-12))
    return owner
