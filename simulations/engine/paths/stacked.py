"""K clients at once by a compiled program (K = 1, "fused": one client after the other, still without autograd)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fl_clients.training.client import Learner
from simulations.engine.cohort import Integers
from simulations.engine.paths.losses import StackedLoss
from simulations.engine.paths.together import CohortPath, Floats
from simulations.engine.program.compiler import Program
from simulations.engine.program.slots import Slot


class StackedPath(CohortPath):
    """Raises UnsupportedModel when the model cannot be compiled either."""

    fuses = True

    def __init__(self, learner: Learner, clients: int) -> None:
        self.program = Program(learner.model)
        self.loss = StackedLoss(learner.application.loss_function(), learner.config)
        super().__init__(learner, clients, self.program.layouts, name="stacked" if clients > 1 else "fused")

    def gradients(
        self, inputs: Sequence[Tensor], targets: Tensor, sizes: Integers, slots: dict[str, Slot]
    ) -> tuple[Floats, Floats]:
        outputs = self.program.forward(inputs, slots, len(sizes))
        several = isinstance(outputs, tuple)
        found = self.loss(outputs if several else (outputs,), targets, sizes, several=several)
        self.program.backward(found.gradients, slots, len(sizes))
        return found.numerators, found.denominators
