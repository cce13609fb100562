"""K clients at once by ``torch.func``: vmap over clients of grad of the loss. For models that cannot be compiled to steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fl_clients.training.client import Learner
from simulations.engine.cohort import Integers
from simulations.engine.paths.together import CohortPath, Floats
from simulations.engine.program.compiler import UnsupportedModel
from simulations.engine.program.slots import Layout, Slot


class FunctionalPath(CohortPath):
    """Any model without state that changes in training; what has no batching rule raises when it runs."""

    def __init__(self, learner: Learner, clients: int) -> None:
        model, loss, config = learner.model, learner.application.loss_function(), learner.config
        if any(True for name, _ in model.named_buffers() if name in model.state_dict()):
            raise UnsupportedModel("it has buffers, which may change in training")
        if not all(p.requires_grad for p in model.parameters()):
            raise UnsupportedModel("some parameters are frozen")
        layouts = [Layout(name, tuple(p.shape)) for name, p in model.named_parameters()]

        def value(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...], targets: Tensor) -> Any:
            numerator, denominator = loss(functional_call(model, parameters, inputs), targets, config)
            return numerator / denominator, (numerator.detach(), denominator.detach())

        self._gradients = vmap(grad(value, has_aux=True))
        super().__init__(learner, clients, layouts, name="functional")

    def gradients(
        self, inputs: Sequence[Tensor], targets: Tensor, sizes: Integers, slots: dict[str, Slot]
    ) -> tuple[Floats, Floats]:
        count, width = targets.shape[:2]
        shaped = [x.view(count, width, *x.shape[1:]) for x in inputs]
        numerators, denominators = np.zeros(count), np.zeros(count)
        for size in np.unique(sizes):  # a smaller last batch is a call of its own: the loss is never told of padding
            rows = np.flatnonzero(sizes == size)
            at = torch.from_numpy(rows) if len(rows) < count else slice(None)
            parameters = {name: slot.value[at] for name, slot in slots.items()}
            found, (n, d) = self._gradients(parameters, tuple(x[at, :size] for x in shaped), targets[at, :size])
            for name, slot in slots.items():
                assert slot.grad is not None
                slot.grad[at] = found[name]
            numerators[rows], denominators[rows] = n.double().numpy(), d.double().numpy()
        return numerators, denominators
