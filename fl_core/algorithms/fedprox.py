"""FedProx (Li et al., MLSys 2020): each client minimises its loss + mu/2 ||w - w_global||^2; the server averages."""

from __future__ import annotations

from fl_core.algorithms.base import Algorithm, ClientUpdate, GradientTerms, MeanAggregator
from fl_core.contracts.sections import AlgorithmConfig


class ProximalUpdate(ClientUpdate):
    """Adds the gradient of the proximal term, mu (w - w_global)."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def terms(self) -> GradientTerms:
        return GradientTerms(proximal=self.mu)


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(MeanAggregator(), ProximalUpdate(config.proximal_mu))
