"""One client of a federation: a request in, a reply out. The same code runs on a device and in a simulation.

The only difference between the two is ``source``: where this client's examples come from.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message, MessageType
from torch import nn

from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Algorithm
from fl_core.contracts.errors import FieldfleetError, RefusedError
from fl_core.flower.messages import Reply, Request
from fl_core.learning.application import Application, application
from fl_core.learning.examples import ClientData, Examples
from fl_core.learning.local_update import local_update
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import predict, set_arrays, tensors

log = logging.getLogger(__name__)
Source = Callable[[Application, Any], Examples]
Version = Callable[[Application, Any], str]
CLIENT_ERROR = 1  # Flower's error code of a message that failed on the client


@dataclass(frozen=True)
class Learner:
    """What one (application, configuration) needs: built once, shared by all clients of a process."""

    application: Application
    config: Any
    model: nn.Module
    algorithm: Algorithm


@dataclass
class Learners:
    """Learners by (application, configuration), built on first use."""

    built: dict[tuple[str, str], Learner] = field(default_factory=dict)

    def get(self, name: str, table: Any) -> Learner:
        key = (name, json.dumps(table, sort_keys=True))
        if key not in self.built:
            app = application(name)
            config = app.configure_from(table, origin=f"the server's request for {name}")
            self.built.clear()  # one model in memory: a new configuration replaces the old one
            self.built[key] = Learner(app, config, app.build_model(config), build_algorithm(config.algorithm))
        return self.built[key]


class ClientRuntime:
    """Answers Flower train and evaluate messages for one client.

    source(application, config) -> Examples: this client's own data.
    allowed: the applications that this client takes part in (None = every installed one).
    version(application, config): changes when the source has other data.
    """

    def __init__(
        self,
        client: str,
        source: Source,
        *,
        learners: Learners | None = None,
        allowed: frozenset[str] | None = None,
        version: Version = lambda application, config: "",
    ) -> None:
        self.client, self.source, self.allowed, self.version = client, source, allowed, version
        self.learners = learners or Learners()
        self._data: tuple[str, ClientData] | None = None
        self.counts: dict[str, int] = {}  # application -> training examples when its data were read last

    def handle(self, message: Message) -> Message:
        """Never raises for a bad request: the error goes back to the server as Flower's error reply."""
        try:
            request = Request.from_record(message.content, origin=f"request to {self.client}")
            if message.metadata.message_type == MessageType.TRAIN:
                reply = self.train(request)
            elif message.metadata.message_type == MessageType.EVALUATE:
                reply = self.evaluate(request)
            else:
                raise RefusedError(f"{self.client}: message type {message.metadata.message_type!r} is not served")
        except Exception as error:  # an application's own code: the round goes on without this client
            return Message(Error(CLIENT_ERROR, failure(self.client, error)), reply_to=message)
        return Message(reply.to_record(), reply_to=message)

    def train(self, request: Request) -> Reply:
        learner = self._learner(request)
        return train_client(learner, self.client, self._own_data(learner, request.seed), request)

    def evaluate(self, request: Request) -> Reply:
        """The global model on this client's validation examples: loss and the application's metrics."""
        learner = self._learner(request)
        return evaluate_client(learner, self._own_data(learner, request.seed), request)

    def _learner(self, request: Request) -> Learner:
        if self.allowed is not None and request.application not in self.allowed:
            raise RefusedError(f"application {request.application!r} is not enabled on this device")
        return self.learners.get(request.application, request.config)

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


def train_client(learner: Learner, client: str, data: ClientData, request: Request) -> Reply:
    """One local update of the request's model on this client's training examples."""
    result = local_update(
        learner.model,
        learner.application,
        learner.config,
        data.train,
        reference=request.arrays,
        client_update=learner.algorithm.client_update,
        client=client,
        round=request.round,
        num_rounds=request.num_rounds,
        seed=request.seed,
    )
    return Reply(num_examples=result.num_examples, metrics={"loss": result.loss}, arrays=result.arrays)


def evaluate_client(learner: Learner, data: ClientData, request: Request) -> Reply:
    """The request's model on this client's validation examples."""
    set_arrays(learner.model, request.arrays, origin="global model")
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
    with torch.inference_mode():
        result = learner.model(*tensors(learner.application, learner.config, examples))
        numerator, denominator = learner.application.loss_function()(
            result, torch.from_numpy(examples.targets), learner.config
        )
    found["loss"] = float(numerator / denominator)
    return {k: v for k, v in found.items() if math.isfinite(v)}
