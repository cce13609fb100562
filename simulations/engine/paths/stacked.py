"""K clients at once by a compiled program (K = 1, "fused": one client after the other, still without autograd)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fl_clients.training.client import Learner
from fl_core.flower.messages import Request
from fl_core.learning import seeding
from simulations.engine import native
from simulations.engine.cohort import Cohort, Course, Integers
from simulations.engine.native.whole import Chain, NotAChain, chain, prepared, train
from simulations.engine.paths.losses import StackedLoss
from simulations.engine.paths.together import CohortPath, Done, Floats
from simulations.engine.program.compiler import Program
from simulations.engine.program.rules import Terms
from simulations.engine.program.slots import Slot, Stack

log = logging.getLogger(__name__)
AT_ONCE_BYTES = 16 << 20


class StackedPath(CohortPath):
    """Raises UnsupportedModel when the model cannot be compiled either."""

    fuses = True

    def __init__(self, learner: Learner, clients: int) -> None:
        self.program = Program(learner.model)
        self.loss = StackedLoss(learner.application.loss_function(), learner.config)
        self._shape: Any = None
        self._chain: Chain | None = None
        super().__init__(learner, clients, self.program.layouts, name="stacked" if clients > 1 else "fused")

    def at_once(self, cohort: Cohort, request: Request, stack: Stack, rate: float, terms: Terms) -> Done | None:
        config, targets = self.learner.config, cohort.targets
        if len(self._specs) != 1 or not native.usable(stack.values) or targets.dim() != 1 or int(targets.min()) < 0:
            return None
        course = cohort.course(request, config)
        each, starts = self._clients_at_once(cohort, course), np.concatenate([[0], np.cumsum(course.sizes)])
        origin, offset = terms.origin, terms.offset(rate)
        assert origin is not None
        if len(origin) > 1:
            stack.values[: len(cohort)] = origin
        shared = origin[0] if len(origin) == 1 else None
        ends, total, weight = np.cumsum(course.steps), np.zeros(len(cohort)), np.zeros(len(cohort))
        keep, denominators = 1 - rate * (config.optimizer.weight_decay + terms.proximal), None
        for first in range(0, len(cohort), each):
            end = min(first + each, len(cohort))
            steps = slice(int(ends[first] - course.steps[first]), int(ends[end - 1]))
            rows = slice(int(starts[steps.start]), int(starts[steps.stop]))
            seeds = None if course.seeds is None else course.seeds[rows]
            (x,), truth = cohort.rows(course.rows[rows], seeds, self._specs, self._augment, config)
            if (
                denominators is None
                and (denominators := self._denominators(x, truth, course, cohort.batch_size)) is None
            ):
                return None
            assert self._chain is not None
            added = offset if offset is None or len(offset) == 1 else offset[first:end]
            total[first:end], weight[first:end] = train(
                self._chain, stack.values, first, prepared(self._chain, self.program, x), truth.long().contiguous(),
                course.sizes[steps], course.steps[first:end], denominators, shared, added, rate, keep,
            )  # fmt: skip
        return total, weight, course.steps

    def start(self, cohort: Cohort, request: Request) -> None:
        """Each client's dropout from its own seed, as in ``local_update``."""
        if self.program.random:
            number, seed = request.round, request.seed
            self.program.draws.start([seeding.key(seed, "dropout", number, name) for name in cohort.names])

    def _denominators(self, x: Tensor, targets: Tensor, course: Course, batch: int) -> Floats | None:
        """Of the loss, by size of batch; None where the program is no chain, or the loss no plain cross-entropy."""
        if not self._planned(x, batch) or self._chain is None:
            return None
        largest = int(course.sizes.max())
        outputs = targets.new_zeros(largest, self._chain.classes, dtype=next(self.learner.model.parameters()).dtype)
        return self.loss.denominators(outputs, targets[:1].expand(largest), course.sizes)

    def _clients_at_once(self, cohort: Cohort, course: Course) -> int:
        """So that their examples, in the order of training, fit in memory beside everything else."""
        bytes_each = sum(x[0].numel() * x.element_size() for x in cohort.inputs.values()) * len(course.rows)
        return max(1, len(cohort) * AT_ONCE_BYTES // max(1, bytes_each))

    def _planned(self, x: Tensor, batch: int) -> bool:
        """Whether the program is a chain for examples of this shape; looked at once."""
        shape = (x.shape[1:], x.dtype)
        if shape != self._shape:
            self._shape, self._chain = shape, None
            try:
                self._chain = chain(self.program, x[:1], batch)
            except NotAChain as reason:
                log.debug("step by step: %s", reason)
        return self._chain is not None

    def gradients(
        self, inputs: Sequence[Tensor], targets: Tensor, sizes: Integers, slots: dict[str, Slot]
    ) -> tuple[Floats, Floats]:
        self.program.draws.sizes = sizes.tolist()
        outputs = self.program.forward(inputs, slots, len(sizes))
        several = isinstance(outputs, tuple)
        found = self.loss(outputs if several else (outputs,), targets, sizes, several=several)
        self.program.backward(found.gradients, slots, len(sizes))
        return found.numerators, found.denominators
