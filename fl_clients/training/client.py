"""One client of a federation: a request in, a reply out. The same code runs on a device and in a simulation.

The only difference between the two is ``source``: where this client's examples come from.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Error, Message, MessageType
from torch import nn

from fl_clients.training.local_round import LocalRound, stored_state, with_personal
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Algorithm
from fl_core.contracts.errors import FieldfleetError, RefusedError
from fl_core.flower.messages import Reply, Request
from fl_core.learning.application import Application, application
from fl_core.learning.client_states import ClientStates
from fl_core.learning.examples import ClientData, Examples
from fl_core.learning.local_update import local_update
from fl_core.learning.partition import client_data
from fl_core.learning.personal import personal_names
from fl_core.learning.torch_arrays import predict, prediction_batch, set_arrays, tensors

log = logging.getLogger(__name__)
Source = Callable[[Application, Any], Examples]
Version = Callable[[Application, Any], str]
States = Callable[[str], ClientStates]
COMPUTE_SHARE = 0.8  # of a round's deadline, for a client that sends what it has by then
CLIENT_ERROR = 1  # Flower's error code of a message that failed on the client


@dataclass(frozen=True)
class Learner:
    """What one (application, configuration) needs: built once, shared by all clients of a process.

    states: where these clients keep what their algorithm needs from round to round; None = each has a place of its own.
    """

    application: Application
    config: Any
    model: nn.Module
    algorithm: Algorithm
    states: ClientStates | None = None


@dataclass
class Learners:
    """Learners by (application, configuration), built on first use."""

    built: dict[tuple[str, str], Learner] = field(default_factory=dict)

    def get(self, name: str, table: Any, defaults: Collection[str] = ()) -> Learner:
        key = (name, json.dumps(table, sort_keys=True))
        if key not in self.built:
            app = application(name)
            config = app.configure_from(table, origin=f"the server's request for {name}", defaults=frozenset(defaults))
            self.built.clear()  # one model in memory: a new configuration replaces the old one
            algorithm = build_algorithm(config.algorithm)
            algorithm.client_update.check(config.optimizer)
            self.built[key] = Learner(app, config, app.build_model(config), algorithm)
        return self.built[key]


class ClientRuntime:
    """Answers Flower train and evaluate messages for one client.

    source(application, config) -> Examples: this client's own data.
    allowed: the applications that this client takes part in (None = every installed one).
    version(application, config): changes when the source has other data.
    states(run): where this client keeps what its algorithm needs from round to round; None = such algorithms are refused.
    clock: seconds; with it ``algorithm.stragglers = "partial"`` ends the local update in time for the round's deadline.
    """

    def __init__(
        self,
        client: str,
        source: Source,
        *,
        learners: Learners | None = None,
        allowed: frozenset[str] | None = None,
        version: Version = lambda application, config: "",
        states: States | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.client, self.source, self.allowed, self.version = client, source, allowed, version
        self.states, self.clock = states, clock
        self.learners = learners or Learners()
        self._data: tuple[str, ClientData] | None = None
        self.counts: dict[str, int] = {}  # application -> training examples when its data were read last

    def handle(self, message: Message) -> Message:
        """Never raises for a bad request: the error goes back to the server as Flower's error reply."""
        try:
            request = Request.from_record(message.content, origin=f"request to {self.client}")
            if message.metadata.message_type == MessageType.TRAIN:
                reply = self.train(request, self._states(message))
            elif message.metadata.message_type == MessageType.EVALUATE:
                reply = self.evaluate(request, self._states(message))
            else:
                raise RefusedError(f"{self.client}: message type {message.metadata.message_type!r} is not served")
        except Exception as error:  # an application's own code: the round goes on without this client
            return Message(Error(CLIENT_ERROR, failure(self.client, error)), reply_to=message)
        return Message(reply.to_record(), reply_to=message)

    def train(self, request: Request, states: ClientStates | None = None) -> Reply:
        expired, learner = self._expiry(), self._learner(request)
        data = self._own_data(learner, request.seed)
        return train_client(learner, self.client, data, request, states, lambda: expired(learner.config.algorithm))

    def evaluate(self, request: Request, states: ClientStates | None = None) -> Reply:
        """The global model, with this client's personal layers, on its validation examples: loss and metrics."""
        learner = self._learner(request)
        return evaluate_client(learner, self.client, self._own_data(learner, request.seed), request, states)

    def _states(self, message: Message) -> ClientStates | None:
        """Each run's by itself: a state of another run means nothing here."""
        return self.states(f"{message.metadata.run_id % 2**64:016x}") if self.states is not None else None

    def _expiry(self) -> Callable[[Any], bool]:
        """Whether a straggler must stop, by its own clock: the rest of the deadline is for carrying model and update."""
        if (clock := self.clock) is None:
            return lambda settings: False
        began = clock()
        return lambda settings: (
            settings.stragglers == "partial" and clock() - began >= COMPUTE_SHARE * settings.deadline_s
        )

    def _learner(self, request: Request) -> Learner:
        if self.allowed is not None and request.application not in self.allowed:
            raise RefusedError(f"application {request.application!r} is not enabled on this device")
        return self.learners.get(request.application, request.config, request.defaults)

    def _own_data(self, learner: Learner, seed: int) -> ClientData:
        version = self.version(learner.application, learner.config)
        key = json.dumps(
            [learner.application.name, repr(learner.config.data), repr(learner.config.model), seed, version]
        )
        if self._data is None or self._data[0] != key:
            examples = self.source(learner.application, learner.config)
            self._data = (key, client_data(examples, self.client, learner.config.data.validation_fraction, seed))
            self.counts[learner.application.name] = len(self._data[1].train)
        return self._data[1]


def train_client(
    learner: Learner,
    client: str,
    data: ClientData,
    request: Request,
    states: ClientStates | None = None,
    expired: Callable[[], bool] = lambda: False,
) -> Reply:
    """One local update of the request's model on this client's training examples.

    states: of this client; without it, those that the learner's clients share. expired: as of ``local_update``.
    """
    parameters = [name for name, p in learner.model.named_parameters() if p.requires_grad]
    local = LocalRound(
        client, request, learner.config, learner.algorithm, parameters, learner.states if states is None else states
    )
    result = local_update(
        learner.model,
        learner.application,
        learner.config,
        data.train,
        reference=local.reference,
        client_update=local.update,
        client=client,
        round=request.round,
        num_rounds=request.num_rounds,
        seed=request.seed,
        max_steps=request.max_steps,
        expired=expired,
    )
    return local.reply(result)


def evaluate_client(
    learner: Learner, client: str, data: ClientData, request: Request, states: ClientStates | None = None
) -> Reply:
    """The request's model, with this client's personal layers, on its validation examples."""
    arrays = request.arrays
    if personal_names(arrays, learner.config.algorithm.personal):
        kept = stored_state(client, request, learner.states if states is None else states, "personal layers")[1]
        arrays = with_personal(arrays, kept)
    set_arrays(learner.model, arrays, origin="global model")
    if len(data.validation) == 0:
        return Reply(num_examples=0, metrics={})
    return Reply(num_examples=len(data.validation), metrics=evaluation(learner, data.validation))


def failure(client: str, error: Exception) -> str:
    """Why this client has no reply, in one line; what is not ours goes to the log with its traceback."""
    if isinstance(error, FieldfleetError):
        return f"{client}: {error.message}"
    log.error("client %s failed", client, exc_info=error)
    return f"{client}: {type(error).__name__}: {error}"[:500]


def evaluation(learner: Learner, examples: Examples) -> dict[str, float]:
    """Finite metrics only: a metric that is undefined on these examples (one class) is left out."""
    import torch

    outputs = predict(learner.model, learner.application, learner.config, examples)
    found = dict(learner.application.metrics(learner.config, outputs, examples))
    learner.model.eval()
    loss_function, size = learner.application.loss_function(), prediction_batch(examples)
    sums = np.zeros(2)
    with torch.inference_mode():
        for start in range(0, len(examples), size):
            part = examples.take(slice(start, start + size))
            result = learner.model(*tensors(learner.application, learner.config, part))
            targets = torch.from_numpy(np.ascontiguousarray(part.targets))
            sums += [float(v) for v in loss_function(result, targets, learner.config)]
    found["loss"] = float(sums[0] / sums[1]) if sums[1] else math.nan
    return {k: v for k, v in found.items() if math.isfinite(v)}
