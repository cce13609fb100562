"""FedDyn (Acar et al., ICLR 2021, Algorithm 1): each client's objective is bent so that all share one stationary point.

    client:  minimises f_i(y) - <h_i, y> + alpha/2 ||y - x||^2;    h_i <- h_i - alpha (y - x)
    server:  h <- h - alpha * sum over the round of p_i (y_i - x); x <- mean(y) - h / alpha

p_i = n_i / (N * mean n): by examples, as everywhere in this package; 1/N as in the paper where the n_i are equal. N is the
number of clients of the federation. h_i holds from the moment the server has counted the update (``ClientStates``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import (
    Algorithm,
    ClientUpdate,
    GradientTerms,
    LocalEnd,
    LocalStart,
    LocalWork,
    MeanAggregator,
    State,
    cast_like,
    stepped_names,
)
from fl_core.contracts.arrays import check_like
from fl_core.contracts.sections import AlgorithmConfig

OWN, MEMORY = "h/", "h/"


class DynamicUpdate(ClientUpdate):
    stateful = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def begin(self, start: LocalStart) -> ClientUpdate:
        return DynamicRound(self.alpha, start)


class DynamicRound(ClientUpdate):
    def __init__(self, alpha: float, start: LocalStart) -> None:
        self.alpha, self._start = alpha, start
        self._names = [name for name in start.parameters if name not in start.personal]
        wanted = {OWN + name: start.reference[name] for name in self._names}
        self._own: dict[str, npt.NDArray[Any]] = {k: start.state.get(k, np.zeros_like(v)) for k, v in wanted.items()}
        check_like(self._own, wanted, origin="this client's gradient memory")

    def terms(self) -> GradientTerms:
        own, reference = self._own, self._start.reference
        correction = tuple(
            -own[OWN + name] if OWN + name in own else np.zeros_like(reference[name]) for name in self._start.parameters
        )
        return GradientTerms(proximal=self.alpha, correction=correction)

    def finish(self, work: LocalWork) -> LocalEnd:
        state = {}
        for name in self._names:
            reference, own = self._start.reference[name], self._own[OWN + name]
            change = work.arrays[name].astype(np.float64) - reference.astype(np.float64)
            state[OWN + name] = (own - self.alpha * change).astype(reference.dtype)
        return LocalEnd(state=state)


class DynamicAggregator(MeanAggregator):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        result = super().finish(state)
        if state.weight <= 0:
            return result
        taking_part = min(1.0, state.count / self.population)
        for name in stepped_names(state.reference):
            mean, start = state.sums[name] / state.weight, state.reference[name].astype(np.float64)
            h = self.memory.get(MEMORY + name, np.zeros_like(mean)) - self.alpha * taking_part * (mean - start)
            self.memory[MEMORY + name] = h
            result[name] = cast_like(mean - h / self.alpha, state.reference[name])
        return result


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(DynamicAggregator(config.feddyn_alpha), DynamicUpdate(config.feddyn_alpha))
