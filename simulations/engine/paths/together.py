"""What the paths that train K clients at once have in common: batches, optimiser, terms of the algorithm, results."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_clients.training.client import Learner
from fl_clients.training.local_round import LocalRound
from fl_core.contracts.arrays import Arrays
from fl_core.flower.messages import Request
from fl_core.learning.local_update import client_learning_rate
from fl_core.learning.personal import personal_names
from fl_core.learning.torch_arrays import set_arrays
from simulations.engine.cohort import Batch, Cohort, CohortCache, Integers, gathered
from simulations.engine.paths import Results, Task
from simulations.engine.paths.parts import Parts, is_plain
from simulations.engine.paths.sequential import SequentialPath
from simulations.engine.program.compiler import UnsupportedModel
from simulations.engine.program.rules import RULES, Terms, adjusted
from simulations.engine.program.slots import Layout, Slot, Stack

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
COHORT_BYTES = 64 << 20  # of examples side by side that a worker keeps from round to round
Done = tuple[Floats, Floats, Integers]  # of each client: numerator and denominator of its loss, steps


class CohortPath(ABC):
    """Raises UnsupportedModel when the optimiser or the algorithm is not one that it knows.

    The batches are those of the sequential local update. Clients are sorted by their number of steps, so that those
    still at work are always the first of the stack; a smaller batch is filled up with examples whose gradient is zero.
    """

    fuses = False  # whether gradients go straight into the parameters where the optimiser allows that

    def __init__(self, learner: Learner, clients: int, layouts: Sequence[Layout], *, name: str) -> None:
        config = learner.config
        self.name, self.learner, self.block = name, learner, clients
        if config.optimizer.name not in RULES:
            raise UnsupportedModel(f"optimizer.name = {config.optimizer.name!r}")
        if learner.algorithm.client_update.terms() is None:
            raise UnsupportedModel(f"algorithm.name = {config.algorithm.name!r} changes gradients in its own way")
        self.layouts = tuple(layouts)
        self.rule = RULES[config.optimizer.name](config.optimizer)
        self._augment = learner.application.augment_function()
        self._specs = [spec.name for spec in learner.application.inputs(config)]
        self._slow, self._told = SequentialPath(learner), False
        self._cohorts = CohortCache(COHORT_BYTES)
        self._stack: Stack | None = None
        self._request: Request | None = None
        self._origin: Tensor | None = None

    def train(self, tasks: Sequence[Task], request: Request) -> Iterator[Results]:
        """Where a client's own code fails, its block is done one by one, so that only that client is refused."""
        for start in range(0, len(tasks), self.block):
            part = tasks[start : start + self.block]
            try:
                with torch.no_grad():
                    found = self.together(part, request)
            except Exception as error:  # an application's own code, or data of clients that do not fit together
                log.log(logging.INFO if self._told else logging.WARNING, "clients are trained one by one: %s", error)
                self._told = True
                self._request = None
                found_each = self._slow.train(part, request)
            else:
                found_each = iter([found])
            for one in found_each:
                one.positions = [start + p for p in one.positions]
                one.failures = {start + p: why for p, why in one.failures.items()}
                yield one

    def together(self, tasks: Sequence[Task], request: Request) -> Results:
        """All of these clients in one stack. Raises what the application's code raises."""
        config = self.learner.config
        cohort = self._cohorts.get(tuple(task.client for task in tasks), lambda: self._gathered(tasks))
        count, parts = len(cohort), self._parts(cohort, request)
        is_sgd = config.optimizer.name == "sgd" and not config.optimizer.momentum
        plain = not (parts.changes or config.optimizer.clip_norm > 0)
        stack = self._ready(count, fused=self.fuses and plain and is_sgd)
        if self._origin is None or parts.rounds:
            self._origin = parts.origin(stack)
        origin = self._origin
        rate = client_learning_rate(config, request.round, request.num_rounds)
        for slot in stack.slots.values():
            slot.rate, slot.keep = rate, 1 - rate * config.optimizer.weight_decay
        added = Terms(
            proximal=parts.proximal,
            correction=parts.correction(stack),
            origin=origin,
            shared=parts.shared_only(stack) if parts.proximal else None,
        )
        simple = is_sgd and not config.optimizer.clip_norm and added.shared is None
        done = self.at_once(cohort, request, stack, rate, added) if simple else None
        if done is None:
            stack.values[:count] = origin
            self.rule.start(stack.values[:count], rate)
            self.start(cohort, request)
            done = self._step_by_step(cohort, request, stack, added)
        total, weight, steps = done
        losses = np.divide(total, weight, out=np.zeros(count), where=weight != 0)
        arrays = {**self._unchanged(request.arrays, stack, count), **stack.arrays(count)}
        return parts.results(cohort, arrays, losses, steps)

    def _gathered(self, tasks: Sequence[Task]) -> Cohort:
        found, size = [task.data().train for task in tasks], self.learner.config.algorithm.batch_size
        return gathered([task.client for task in tasks], found, size, keyed=self._augment is not None)

    def at_once(self, cohort: Cohort, request: Request, stack: Stack, rate: float, terms: Terms) -> Done | None:
        """All steps of all clients from ``terms.origin``, where this path can do that without looking at each; SGD without
        momentum or clipping.
        """
        return None

    def start(self, cohort: Cohort, request: Request) -> None:
        """Before the first step of these clients, where they do not go at once."""
        log.debug("%d clients step by step", len(cohort))

    def _step_by_step(self, cohort: Cohort, request: Request, stack: Stack, added: Terms) -> Done:
        config = self.learner.config
        total, weight, steps = np.zeros(len(cohort)), np.zeros(len(cohort)), np.zeros(len(cohort), np.int64)
        slots: dict[str, Slot] = {}
        for batch in cohort.batches(request, config):
            active = len(batch.sizes)
            if not slots or active < len(next(iter(slots.values())).value):
                slots = {name: slot.narrowed(active) for name, slot in stack.slots.items()}
            numerators, denominators = self._pass(cohort, batch, slots)
            total[:active] += numerators
            weight[:active] += denominators
            steps[:active] += 1
            if stack.grads is not None:
                adjusted(stack.values[:active], stack.grads[:active], added, config.optimizer.clip_norm)
                self.rule.step(stack.values[:active], stack.grads[:active])
        return total, weight, steps

    def _parts(self, cohort: Cohort, request: Request) -> Parts:
        algorithm, config = self.learner.algorithm, self.learner.config
        if self._request is not request:  # the same for all blocks of a round
            set_arrays(self.learner.model, request.arrays, origin="global model")  # with its buffers
            self._request, self._origin = request, None
        names = [name for name, p in self.learner.model.named_parameters() if p.requires_grad]
        if is_plain(algorithm.client_update) and not personal_names(request.arrays, config.algorithm.personal):
            return Parts(names, request.arrays, [], algorithm.client_update.terms())
        states = self.learner.states
        rounds = [LocalRound(client, request, config, algorithm, names, states) for client in cohort.names]
        return Parts(names, request.arrays, rounds, None)

    @abstractmethod
    def gradients(
        self, inputs: Sequence[Tensor], targets: Tensor, sizes: Integers, slots: dict[str, Slot]
    ) -> tuple[Floats, Floats]:
        """Hands each parameter's gradient of each client's mean loss to its slot; returns the losses as (numerators,
        denominators), (K,) each. inputs: (K B, ...); targets: (K, B, ...); sizes: (K,) examples that count.
        """

    def _pass(self, cohort: Cohort, batch: Batch, slots: dict[str, Slot]) -> tuple[Floats, Floats]:
        device = next(iter(slots.values())).value.device
        inputs, targets = cohort.take(batch, self._specs, self._augment, self.learner.config)
        return self.gradients([x.to(device) for x in inputs], targets.to(device), batch.sizes, slots)

    def _ready(self, count: int, *, fused: bool) -> Stack:
        """The stack, made at the first call and again when gradients are handled in another way."""
        if self._stack is None or (self._stack.grads is None) != fused or len(self._stack.values) < count:
            parameter = next(self.learner.model.parameters())
            size = max(count, self.block)
            self._stack = Stack(self.layouts, size, fused=fused, dtype=parameter.dtype, device=parameter.device)
            self.learner.model.train()
        return self._stack

    @staticmethod
    def _unchanged(reference: Arrays, stack: Stack, count: int) -> Arrays:
        """Buffers that no step changes."""
        return {n: np.broadcast_to(a, (count, *a.shape)) for n, a in reference.items() if n not in stack.slots}
