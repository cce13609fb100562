"""Cross entropy between densities, and the compliance itself by its adjoint; as (numerator, denominator)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from applications.topology_optimisation.problems import Problem

EPSILON = 1e-6
LOSS_TOLERANCE, LOSS_LIMIT = 5e-3, 60  # the error of the compliance is the square


class LogCompliance(torch.autograd.Function):
    """density (N, D, H, W), problems -> (N,) log of the compliance. The problem is self-adjoint: one analysis gives both."""

    @staticmethod
    def forward(ctx: Any, density: Tensor, problems: list[Problem]) -> Tensor:
        from applications.topology_optimisation.simp import Analysis

        values, gradients = [], []
        for one, problem in zip(density.detach().cpu().numpy().astype(np.float64), problems, strict=True):
            value, gradient = Analysis(problem, tolerance=LOSS_TOLERANCE, limit=LOSS_LIMIT)(one)
            values.append(np.log(value))
            gradients.append(gradient / value)
        ctx.save_for_backward(torch.from_numpy(np.stack(gradients)).to(density))
        return torch.tensor(np.array(values), dtype=density.dtype, device=density.device)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradients,) = ctx.saved_tensors
        return outputs[0].reshape(-1, 1, 1, 1) * gradients, None


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """outputs: (N, D, H, W); targets: (N, D, H, W), or packed with the problem where the compliance counts (pipeline).

    Returns (sum over examples of the mean cross entropy plus compliance_weight times the log of the compliance, N).
    """
    truth = targets[:, 0, :-1, :-1, :-1] if targets.ndim == 5 else targets
    density = outputs.clamp(EPSILON, 1 - EPSILON)
    entropy = functional.binary_cross_entropy(density, truth.to(density.dtype), reduction="none")
    total = entropy.mean(dim=(1, 2, 3)).sum()
    weight = config.model.compliance_weight
    if weight > 0:
        total = total + weight * LogCompliance.apply(outputs, problems(targets)).sum()
    return total, density.new_tensor(float(len(density)))


def problems(targets: Tensor) -> list[Problem]:
    """From packed targets (N, 7, nodes...)."""
    found = []
    for one in targets.detach().cpu().numpy():
        density = one[0, :-1, :-1, :-1]
        fixed = one[4:7] > 0.5
        found.append(
            Problem(
                shape=density.shape,
                force=one[1:4].astype(np.float32),
                fixed=fixed,
                volume_fraction=float(np.clip(density.mean(), 0.01, 0.99)),
            )
        )
    return found
