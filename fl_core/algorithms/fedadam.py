"""FedAdam (Reddi et al., ICLR 2021, Algorithm 2): Adam on the server, the mean client change as its gradient.

Without bias correction and with v_{-1} = tau^2, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fl_core.algorithms.base import Algorithm, ClientUpdate, Float64, MeanAggregator, is_statistic
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.sections import AlgorithmConfig


class AdaptiveAggregator(MeanAggregator):
    """First and second moments of the mean change, in float64; ``second_moment`` is what FedYogi replaces."""

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__()
        self.config = config

    def step(self, reference: Arrays, mean: Mapping[str, Float64]) -> Mapping[str, Float64]:
        c, result = self.config, dict(mean)
        for name, value in mean.items():
            if reference[name].dtype.kind != "f" or is_statistic(name):
                continue
            start = reference[name].astype(np.float64)
            change = value - start
            m = self.memory.get(f"m/{name}", np.zeros_like(change))
            v = self.memory.get(f"v/{name}", np.full_like(change, c.tau**2))
            m = c.beta_1 * m + (1 - c.beta_1) * change
            v = self.second_moment(v, change)
            self.memory[f"m/{name}"], self.memory[f"v/{name}"] = m, v
            result[name] = start + c.server_lr * m / (np.sqrt(v) + c.tau)
        return result

    def second_moment(self, v: Float64, change: Float64) -> Float64:
        beta = self.config.beta_2
        return beta * v + (1 - beta) * change**2


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(AdaptiveAggregator(config), ClientUpdate())
