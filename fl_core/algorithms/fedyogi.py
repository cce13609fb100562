"""FedYogi (Reddi et al., ICLR 2021, Algorithm 2): FedAdam with Yogi's sign-controlled second moment."""

from __future__ import annotations

import numpy as np

from fl_core.algorithms.base import Algorithm, ClientUpdate, Float64
from fl_core.algorithms.fedadam import AdaptiveAggregator
from fl_core.contracts.sections import AlgorithmConfig


class YogiAggregator(AdaptiveAggregator):
    def second_moment(self, v: Float64, change: Float64) -> Float64:
        square = change**2
        return v - (1 - self.config.beta_2) * square * np.sign(v - square)


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(YogiAggregator(config), ClientUpdate())
