"""Label skew: sorted by label, cut into shards, a few of them to each client (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_core.contracts.config import number
from simulations.partitioners.base import ClientsOptions, Ids, Units, deal


@dataclass(frozen=True, kw_only=True)
class Options(ClientsOptions):
    shards: int = number(2, low=1, help="of each client")


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    shuffled = rng.permutation(len(units))
    order = shuffled[np.argsort(units.labels[shuffled], kind="stable")]
    count = options.clients * options.shards
    owner_of_shard = rng.permutation(np.repeat(np.arange(options.clients), options.shards))
    owner = np.empty(len(units), np.int64)
    owner[order] = owner_of_shard[deal(order, units.sizes, np.ones(count))]
    return owner
