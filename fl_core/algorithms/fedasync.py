"""FedAsync (Xie, Koyejo and Gupta, OPT 2020): asynchronous; each model that arrives is mixed into the global one.

    x <- (1 - a) x + a y,        a = mixing * s(t),        s(t) = (1 + t)^-staleness_power

t is how many models came since the client started (polynomial staleness, the paper's section 5.2). Of a buffer of several, or
in a synchronous round, the example-weighted mean of the models is mixed in, with the weighted mean of their a.
Its client minimises the loss + ``algorithm.proximal_mu``/2 ||y - x||^2, as in the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import Algorithm, MeanAggregator, State, Update, add_scaled, cast_like, stepped_names
from fl_core.algorithms.fedbuff import discount
from fl_core.algorithms.fedprox import ProximalUpdate
from fl_core.contracts.sections import AlgorithmConfig

MIXED = "mixed/weight"


class MixingAggregator(MeanAggregator):
    asynchronous = True

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__()
        self.config = config

    def add(self, state: State, update: Update) -> None:
        weight = update.weight * self.config.mixing * discount(update.staleness, self.config.staleness_power)
        for name, array in update.arrays.items():
            if name not in state.sums:
                state.sums[name] = np.zeros(array.shape, np.float64)
            add_scaled(state.sums[name], array, weight)
        state.sums[MIXED] = state.sums.get(MIXED, np.zeros(())) + weight
        state.weight += update.weight
        state.count += 1

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        if state.weight <= 0:
            return super().finish(state)
        mixed = float(state.sums[MIXED])
        share, stepped, result = mixed / state.weight, set(stepped_names(state.reference)), {}
        for name, reference in state.reference.items():
            value = state.sums[name] / mixed
            if name in stepped:
                start = reference.astype(np.float64)
                value = start + share * (value - start)
            result[name] = cast_like(value, reference)
        return result


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(MixingAggregator(config), ProximalUpdate(config.proximal_mu))
