"""Clients share one true model; each has its own input mean (feature shift)."""

from __future__ import annotations

import numpy as np

from applications.toy_regression.config import Config
from applications.toy_regression.data import Rows
from fl_core.learning import seeding


def generate(config: Config, seed: int) -> Rows:
    """data.clients x data.examples_per_client rows; client k is the same whatever the number of clients."""
    d = config.data
    weights = seeding.generator(seed, "toy truth").normal(size=d.features)
    clients, xs, ys = [], [], []
    for k in range(d.clients):
        rng = seeding.generator(seed, "toy client", k)
        x = rng.normal(rng.normal(0, d.shift, d.features), 1.0, (d.examples_per_client, d.features))
        clients.append(np.repeat(f"client-{k:04d}", d.examples_per_client))
        xs.append(x)
        ys.append(x @ weights + d.noise * rng.normal(size=d.examples_per_client))
    return Rows(np.concatenate(clients), np.concatenate(xs).astype(np.float32), np.concatenate(ys).astype(np.float32))
