"""FedBuff (Nguyen et al., AISTATS 2022, Algorithm 1): asynchronous; the server steps when ``algorithm.buffer`` updates are in.

    x <- x + global_lr * sum_i n_i s(t_i) (y_i - x_i) / sum_i n_i,        s(t) = (1 + t)^-staleness_power

x_i is the model that client i started from and t_i how many models came since. The paper weighs all clients alike; here
they are weighed by examples, as everywhere in this package. Without stale updates this is FedAvg.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import (
    Algorithm,
    ClientUpdate,
    MeanAggregator,
    State,
    Update,
    add_scaled,
    cast_like,
    stepped_names,
)
from fl_core.contracts.sections import AlgorithmConfig

CHANGE = "change/"


def discount(staleness: int, power: float) -> float:
    """s(t): 1 for an update of the newest model, less for older ones (polynomial; the paper's power is 1/2)."""
    return float((1.0 + staleness) ** -power)


class BufferedAggregator(MeanAggregator):
    """Sums of n_i s_i (y_i - x_i) beside those of n_i y_i (which running statistics and counters are averaged by)."""

    asynchronous = True

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__()
        self.config = config

    def add(self, state: State, update: Update) -> None:
        super().add(state, update)
        base = state.reference if update.base is None else update.base
        weight = update.weight * discount(update.staleness, self.config.staleness_power)
        for name in stepped_names(state.reference):
            key = CHANGE + name
            if key not in state.sums:
                state.sums[key] = np.zeros(state.reference[name].shape, np.float64)
            add_scaled(state.sums[key], update.arrays[name], weight)
            add_scaled(state.sums[key], base[name], -weight)

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        result = super().finish(state)
        if state.weight <= 0:
            return result
        for name in stepped_names(state.reference):
            reference = state.reference[name]
            step = self.config.global_lr * state.sums[CHANGE + name] / state.weight
            result[name] = cast_like(reference.astype(np.float64) + step, reference)
        return result


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(BufferedAggregator(config), ClientUpdate())
