"""What the algorithm has to say in the local updates of a stack of clients: origins, terms, and what each sends back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_clients.training.local_round import LocalRound
from fl_core.algorithms.base import ClientUpdate, GradientTerms
from fl_core.contracts.arrays import Arrays
from fl_core.learning.local_update import LocalResult
from simulations.engine.cohort import Cohort
from simulations.engine.paths import Results
from simulations.engine.program.compiler import UnsupportedModel
from simulations.engine.program.slots import Stack


def is_plain(update: ClientUpdate) -> bool:
    """Whether every client does the same and sends its model alone."""
    kind = type(update)
    return not update.stateful and kind.begin is ClientUpdate.begin and kind.finish is ClientUpdate.finish


@dataclass(frozen=True)
class Parts:
    """parameters: names in the model's order. rounds: one a client, where each has its own part; else ``shared`` terms."""

    parameters: Sequence[str]
    reference: Arrays
    rounds: Sequence[LocalRound]
    shared: GradientTerms | None

    @property
    def terms(self) -> list[GradientTerms]:
        """Raises UnsupportedModel for terms of another kind."""
        found = [local.update.terms() for local in self.rounds] or [self.shared]
        known = [terms for terms in found if terms is not None]
        if len(known) < len(found):
            raise UnsupportedModel("the algorithm changes gradients in its own way")
        return known

    @property
    def changes(self) -> bool:
        return any(terms.proximal or terms.correction for terms in self.terms)

    @property
    def proximal(self) -> float:
        """Raises UnsupportedModel where clients differ in it."""
        found = {terms.proximal for terms in self.terms}
        if len(found) > 1:
            raise UnsupportedModel("clients have different proximal terms")
        return found.pop()

    def origin(self, stack: Stack) -> Tensor:
        """(K or 1, P): what each client starts from."""
        references = [local.reference for local in self.rounds] or [self.reference]
        return torch.stack([self._flat(stack, reference) for reference in references])

    def correction(self, stack: Stack) -> Tensor | None:
        """(K or 1, P)."""
        found = self.terms
        if not any(terms.correction for terms in found):
            return None
        rows = []
        for terms in found:
            table = dict(zip(self.parameters, terms.correction, strict=True)) if terms.correction else {}
            rows.append(self._flat(stack, table) if table else torch.zeros_like(stack.values[0]))
        shared = self.shared_only(stack)
        return torch.stack(rows) if shared is None else torch.stack(rows).mul_(shared)

    def shared_only(self, stack: Stack) -> Tensor | None:
        """(1, P): 0 for personal layers, on which the terms have no part, else 1; None where there are none."""
        shared = self.terms[0].shared  # the same patterns for every client
        if not shared:
            return None
        table = dict(zip(self.parameters, shared, strict=True))
        ones = {name: np.full_like(self.reference[name], known) for name, known in table.items()}
        return self._flat(stack, ones).unsqueeze(0)

    @staticmethod
    def _flat(stack: Stack, arrays: Arrays) -> Tensor:
        return stack.flat([torch.from_numpy(np.array(arrays[layout.name])) for layout in stack.layouts])

    def results(
        self, cohort: Cohort, arrays: Arrays, losses: npt.NDArray[np.float64], steps: npt.NDArray[np.int64]
    ) -> Results:
        """In the order of the cohort; arrays: (K, ...)."""
        counts = cohort.counts.tolist()
        if not self.rounds:
            return Results(cohort.positions, arrays, counts, [{"loss": float(value)} for value in losses])
        replies = [
            local.reply(LocalResult({n: a[k] for n, a in arrays.items()}, counts[k], float(losses[k]), int(steps[k])))
            for k, local in enumerate(self.rounds)
        ]
        sent = {name: np.stack([reply.arrays[name] for reply in replies]) for name in replies[0].arrays}
        return Results(
            cohort.positions,
            sent,
            counts,
            [dict(reply.metrics) for reply in replies],
            extra=[reply.extra for reply in replies] if any(reply.extra for reply in replies) else (),
        )
