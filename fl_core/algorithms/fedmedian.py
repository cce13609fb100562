"""FedMedian (Yin et al., ICML 2018): the coordinate-wise, unweighted median; tolerates under half of bad updates.

An order statistic has no running sum: the updates of one round are held until it ends (clients x model bytes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import Aggregator, Algorithm, ClientUpdate, State, Update, cast_like
from fl_core.contracts.sections import AlgorithmConfig


class MedianAggregator(Aggregator):
    def add(self, state: State, update: Update) -> None:
        state.held.append(update.arrays)
        state.weight += update.weight
        state.count += 1

    def merge(self, state: State, other: State) -> None:
        state.held.extend(other.held)
        state.weight += other.weight
        state.count += other.count

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        if not state.held:
            return {k: np.array(v) for k, v in state.reference.items()}
        return {
            name: cast_like(np.median(np.stack([u[name] for u in state.held]).astype(np.float64), axis=0), ref)
            for name, ref in state.reference.items()
        }


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(MedianAggregator(), ClientUpdate())
