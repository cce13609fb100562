"""Optimisers over the parameters of K clients, (K, P), with torch's arithmetic; each client starts afresh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_core.contracts.sections import OptimizerConfig

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the algorithm adds to a gradient: shared * proximal * (w - origin) + correction; each (K, P), or (1, P) for all.

    shared: 0 where nothing is pulled (personal layers), else 1; None = everything is.
    """

    proximal: float = 0.0
    correction: Tensor | None = None
    origin: Tensor | None = None
    shared: Tensor | None = None

    def offset(self, rate: float) -> Tensor | None:
        """(K or 1, P): what each step of SGD adds beside ``w *= 1 - rate * proximal``; where everything is pulled."""
        parts = [] if self.correction is None else [self.correction.mul(-rate)]
        if self.proximal and self.origin is not None:
            parts.append(self.origin.mul(rate * self.proximal))
        return (parts[0] if len(parts) == 1 else parts[0] + parts[1]).contiguous() if parts else None


class Rule(ABC):
    """Changes values (K, P) by grads (K, P), which it may overwrite."""

    @abstractmethod
    def start(self, values: Tensor, rate: float) -> None: ...

    @abstractmethod
    def step(self, values: Tensor, grads: Tensor) -> None:
        """One step of the first ``len(values)`` clients."""


class Sgd(Rule):
    def __init__(self, config: OptimizerConfig) -> None:
        self.momentum, self.decay = config.momentum, config.weight_decay

    def start(self, values: Tensor, rate: float) -> None:
        self.rate = rate
        self._moving = torch.zeros_like(values) if self.momentum else None  # zero: the first step gives the gradient

    def step(self, values: Tensor, grads: Tensor) -> None:
        if self.decay:
            grads.add_(values, alpha=self.decay)
        if self._moving is not None:
            grads = self._moving[: len(values)].mul_(self.momentum).add_(grads)
        values.sub_(grads, alpha=self.rate)


class AdamW(Rule):
    def __init__(self, config: OptimizerConfig) -> None:
        self.decay = config.weight_decay

    def start(self, values: Tensor, rate: float) -> None:
        self.rate, self.count = rate, 0
        self._first, self._second = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, values: Tensor, grads: Tensor) -> None:
        """All clients of a stack have taken as many steps: those that are done drop out at the end."""
        self.count += 1
        (beta1, beta2), n = ADAM_BETAS, len(values)
        values.mul_(1 - self.rate * self.decay)
        first = self._first[:n].lerp_(grads, 1 - beta1)
        second = self._second[:n].mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        scale = (second.sqrt() / (1 - beta2**self.count) ** 0.5).add_(ADAM_EPS)
        values.addcdiv_(first, scale, value=-self.rate / (1 - beta1**self.count))


RULES: dict[str, type[Sgd] | type[AdamW]] = {"sgd": Sgd, "adamw": AdamW}


def adjusted(values: Tensor, grads: Tensor, terms: Terms, clip_norm: float) -> None:
    """The algorithm's terms, then clipping by each client's own norm, in the order of the sequential local update."""
    if terms.proximal and terms.origin is not None:
        moved = values - terms.origin[: len(values)]
        grads.add_(moved if terms.shared is None else moved.mul_(terms.shared), alpha=terms.proximal)
    if terms.correction is not None:
        grads.add_(terms.correction[: len(grads)])
    if clip_norm > 0:
        norm = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
        grads.mul_((clip_norm / (norm + CLIP_EPS)).clamp_(max=1.0))
