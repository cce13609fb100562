"""One client after the other, by the code that runs on a device: the oracle of every other path."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from fl_clients.training.client import Learner, failure, train_client
from fl_core.flower.messages import Request
from simulations.engine.paths import Results, Task

log = logging.getLogger(__name__)
BLOCK = 4  # clients whose sum is one leaf of the summation tree: fewer partial states, still fine enough to balance


class SequentialPath:
    name = "sequential"
    block = BLOCK

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def train(self, tasks: Sequence[Task], request: Request) -> Iterator[Results]:
        for position, task in enumerate(tasks):
            try:
                reply = train_client(self.learner, task.client, task.data(), request)
            except Exception as error:  # an application's own code: the round goes on without this client
                yield Results([], {}, [], [], failures={position: failure(task.client, error)})
                continue
            yield Results(
                [position],
                {name: np.asarray(array)[None] for name, array in reply.arrays.items()},
                [reply.num_examples],
                [reply.metrics],
                extra=[reply.extra] if reply.extra else (),
            )
