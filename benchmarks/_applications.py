"""The applications in the simulation benchmark, on generated data, and their plain loop: model, loss, optimiser, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import _workloads as workloads
from fl_core.learning import seeding
from fl_core.learning.application import Application, application
from fl_core.learning.examples import Examples, RawData
from fl_core.learning.local_update import augmented, client_learning_rate, schedule
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import tensors
from fl_core.optimizers import build_optimizer
from simulations.engine.population import ExamplesPopulation

CLIENTS = {"driver_conflict": 67, "plant_disease": 24}


@dataclass(frozen=True)
class Problem:
    application: Application
    config: Any
    raw: RawData


def problem(name: str, clients: int) -> Problem:
    """A workload, or an application by its default preset: every client in every round, none held out."""
    if name in workloads.WORKLOADS:
        config = workloads.configured(name, clients)
        return Problem(workloads.APPLICATION, config, workloads.generate(config, 0))
    app = application(name)
    settings = [f"data.clients={clients}", "algorithm.clients_per_round=0", "algorithm.evaluate_every=0"]
    if hasattr(app.configure().data, "holdout_fraction"):
        settings.append("data.holdout_fraction=0.0")
    config = app.configure(settings)
    return Problem(app, config, app.generate(config, 0))


class PlainClients:
    """What one process of a plain loop has in memory: the model, and every client's examples."""

    def __init__(self, found: Problem) -> None:
        self.found, self.model = found, found.application.build_model(found.config)
        examples = found.raw.examples(found.config)
        names = sorted(examples.clients())
        population, fraction = ExamplesPopulation(examples, names), found.config.data.validation_fraction
        self.data: list[Examples] = [
            client_data(population.examples(i), name, fraction, 0).train for i, name in enumerate(names)
        ]
        self.names = names

    def train(self, client: int, start: Mapping[str, Tensor], round: int, num_rounds: int) -> int:
        """The model is the client's own afterwards; returns its number of examples."""
        app, config, data, name = self.found.application, self.found.config, self.data[client], self.names[client]
        self.model.load_state_dict(start)
        self.model.train()
        rate = client_learning_rate(config, round, num_rounds)
        optimizer = build_optimizer(self.model, replace(config.optimizer, lr=rate))
        loss, augment = app.loss_function(), app.augment_function()
        for epoch, index in schedule(config, len(data), seed=0, round=round, client=name):
            key = seeding.key(0, "augment", round, name, epoch)
            batch = augmented(data.take(index), index, key, config, augment)
            optimizer.zero_grad()
            numerator, denominator = loss(
                self.model(*tensors(app, config, batch)), torch.from_numpy(np.ascontiguousarray(batch.targets)), config
            )
            (numerator / denominator).backward()
            if config.optimizer.clip_norm > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
        return len(data)
