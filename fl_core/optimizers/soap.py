"""SOAP (Vyas et al., ICLR 2025, arXiv:2409.11321): Adam in the eigenbasis of Shampoo's preconditioner; pytorch-optimizer's.

The first step measures and changes nothing, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from pytorch_optimizer import SOAP
from torch import Tensor

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import trainable

TIE = 1e-4  # of the mean eigenvalue


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    return Soap(
        trainable(model),
        lr=config.lr,
        weight_decay=config.weight_decay,
        shampoo_beta=config.decay,
        precondition_frequency=config.update_every,
        max_precondition_dim=config.max_factor,
    )


class Soap(SOAP):  # type: ignore[misc]
    """With a reproducible basis where the statistics have none of their own.

    One gradient of a layer with more inputs than outputs leaves a null space in which rounding, and so the number of
    processes, would choose the axes that Adam's second moments are taken along: a small rising diagonal chooses instead.
    """

    def update_pre_conditioner(self, grad: Tensor, state: dict[str, Any], *args: Any, **options: Any) -> None:
        for dim, statistics in enumerate(state["GG"]):
            if len(statistics):
                size = len(statistics)
                mean = grad.square().sum() / grad.shape[dim] * (1 - state["shampoo_beta"])
                rising = torch.linspace(1, 2, size, dtype=statistics.dtype, device=statistics.device)
                statistics.diagonal().add_(rising * (TIE * mean))
        super().update_pre_conditioner(grad, state, *args, **options)

    @staticmethod
    def get_orthogonal_matrix(mat: Any) -> list[Any]:
        return [_by_rows(q) for q in SOAP.get_orthogonal_matrix(mat)]

    def get_orthogonal_matrix_qr(self, *args: Any, **options: Any) -> list[Any]:
        return [_by_rows(q) for q in super().get_orthogonal_matrix_qr(*args, **options)]


def _by_rows(basis: Any) -> Any:
    """As a checkpoint holds it: products with another memory layout round otherwise."""
    return basis.contiguous() if torch.is_tensor(basis) else basis
