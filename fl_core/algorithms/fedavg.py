"""Federated averaging (McMahan et al., AISTATS 2017, Algorithm 1): the example-weighted mean of the clients' models."""

from __future__ import annotations

from fl_core.algorithms.base import Algorithm, ClientUpdate, MeanAggregator
from fl_core.contracts.sections import AlgorithmConfig


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(MeanAggregator(), ClientUpdate())
