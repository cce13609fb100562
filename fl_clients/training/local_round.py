"""One client's training round around its local update, whichever path runs that: what it starts from, what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
from torch import Tensor, nn

from fl_core.algorithms.base import Algorithm, ClientUpdate, GradientTerms, LocalEnd, LocalStart, LocalWork
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.counted import counted_round, without_counted
from fl_core.contracts.errors import RefusedError
from fl_core.flower.messages import Reply, Request
from fl_core.learning.client_states import ClientStates
from fl_core.learning.local_update import LocalResult, client_learning_rate
from fl_core.learning.personal import personal_names

PERSONAL, OWN = "personal/", "algorithm/"


class LocalRound:
    """``reference`` is the model to start from and ``update`` the algorithm's part in the gradients; then ``reply``.

    parameters: names of the trainable ones, in the order of the model's. states: needed by algorithms that keep
    something on the client, and for personal layers. Raises RefusedError without them, IntegrityError for a request that
    does not fit.
    """

    def __init__(
        self,
        client: str,
        request: Request,
        config: Any,
        algorithm: Algorithm,
        parameters: Sequence[str],
        states: ClientStates | None,
    ) -> None:
        self._client, self._request, self._config, self._states = client, request, config, states
        self._personal = personal_names(request.arrays, config.algorithm.personal)
        self._stateful = algorithm.client_update.stateful or bool(self._personal)
        self._counted, kept = self._kept()
        self.reference: Arrays = with_personal(request.arrays, kept)
        update = algorithm.client_update.begin(
            LocalStart(
                parameters=tuple(parameters),
                reference=self.reference,
                extra=without_counted(request.extra),
                personal=self._personal,
                state={k.removeprefix(OWN): v for k, v in kept.items() if k.startswith(OWN)},
            )
        )

        shared = [name not in self._personal for name in parameters]
        self.update = update if all(shared) else SharedOnly(update, shared)

    def _kept(self) -> tuple[int, Arrays]:
        if not self._stateful:
            return 0, {}
        return stored_state(self._client, self._request, self._states, self._config.algorithm.name)

    def reply(self, result: LocalResult) -> Reply:
        """Stores what this client keeps, and returns what it sends: everything but its personal layers."""
        request, end = self._request, LocalEnd()
        if result.steps:
            end = self.update.finish(
                LocalWork(
                    arrays=result.arrays,
                    num_examples=result.num_examples,
                    steps=result.steps,
                    lr=client_learning_rate(self._config, request.round, request.num_rounds),
                    momentum=self._config.optimizer.momentum,
                )
            )
        if self._stateful and self._states is not None and result.steps:
            state = {OWN + name: array for name, array in end.state.items()}
            state |= {PERSONAL + name: result.arrays[name] for name in self._personal}
            self._states.write(self._client, request.round, self._counted, state)
        return Reply(
            num_examples=result.num_examples,
            metrics={"loss": result.loss},
            arrays={name: array for name, array in result.arrays.items() if name not in self._personal},
            extra=end.extra,
        )


class SharedOnly(ClientUpdate):
    """An algorithm's part in one client's round, without its terms on personal layers: these follow the client's own loss.

    shared: one for each parameter, in their order. An algorithm that changes gradients in its own way is asked as it is.
    """

    def __init__(self, update: ClientUpdate, shared: Sequence[bool]) -> None:
        self._update, self._shared = update, tuple(shared)
        self.frozen = update.frozen

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        self._update.prepare(targets)

    def restrict(self, outputs: Any) -> Any:
        return self._update.restrict(outputs)

    def terms(self) -> GradientTerms | None:
        terms = self._update.terms()
        return terms if terms is None else replace(terms, shared=self._shared)

    def adjust_gradients(self, parameters: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
        if self._update.terms() is None:
            self._update.adjust_gradients(parameters, reference)
        else:
            super().adjust_gradients(parameters, reference)

    def observe(self, model: nn.Module, batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        self._update.observe(model, batches)

    def finish(self, work: LocalWork) -> LocalEnd:
        return self._update.finish(work)


def stored_state(client: str, request: Request, states: ClientStates | None, algorithm: str) -> tuple[int, Arrays]:
    """(round of the update that was counted last, the state of then)."""
    if states is None:
        raise RefusedError(
            f"algorithm {algorithm!r} keeps a state on each client, and this one has no place for it",
            remedy="start it with a folder for states",
        )
    counted = counted_round(request.extra, client, origin="the server's request")
    return counted, states.read(client, counted)


def with_personal(arrays: Arrays, kept: Arrays) -> Arrays:
    """The global model with a client's own layers in place of the global ones."""
    own = {k.removeprefix(PERSONAL): v for k, v in kept.items() if k.startswith(PERSONAL)}
    return {**arrays, **{name: array for name, array in own.items() if name in arrays}} if own else arrays
