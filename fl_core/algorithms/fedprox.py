"""FedProx (Li et al., MLSys 2020): each client minimises its loss + mu/2 ||w - w_global||^2; the server averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fl_core.algorithms.base import Algorithm, ClientUpdate, MeanAggregator
from fl_core.contracts.sections import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor


class ProximalUpdate(ClientUpdate):
    """Adds the gradient of the proximal term, mu (w - w_global)."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def adjust_gradients(self, parameters: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
        for parameter, origin in zip(parameters, reference, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=self.mu)


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(MeanAggregator(), ProximalUpdate(config.proximal_mu))
