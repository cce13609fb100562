"""Optimisers without torch's compiler: the same steps to the bit, and no import of it."""

from __future__ import annotations

import json

import pytest
import torch

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import build_optimizer
from tests.helpers import run_python

TORCH = {
    "sgd": lambda p, c: torch.optim.SGD(p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay),
    "adamw": lambda p, c: torch.optim.AdamW(p, lr=c.lr, weight_decay=c.weight_decay, fused=True),
}
SETTINGS = [
    OptimizerConfig(name="sgd", lr=0.1),
    OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
    OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c.name} {c.momentum}")
def test_steps_are_those_of_torch(config: OptimizerConfig) -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = build_optimizer(models[0], config), TORCH[config.name](models[1].parameters(), config)
    assert isinstance(ours, type(theirs))
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(data).pow(2).mean().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    assert ours.step(lambda: 3.0) == 3.0


def test_a_local_update_does_not_import_the_compiler() -> None:
    code = """
import json, sys
import numpy as np
from tests.helpers import small_config
from fl_clients.training.client import Learner, train_client
from fl_core.algorithms import build_algorithm
from fl_core.contracts.config import to_table
from fl_core.flower.messages import Request
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import get_arrays
for name in ("toy_regression", "driver_conflict"):  # SGD, AdamW
    app, config = small_config(name)
    learner = Learner(app, config, app.build_model(config), build_algorithm(config.algorithm))
    examples = app.generate(config, 0).examples(config)
    client = examples.clients()[0]
    data = client_data(examples.of_clients([client]), client, 0.0, 0)
    request = Request(application=name, config=to_table(config), round=1, num_rounds=1, seed=0,
                      arrays=get_arrays(learner.model), max_steps=1)
    train_client(learner, client, data, request)
print(json.dumps([m for m in ("torch._dynamo", "sympy") if m in sys.modules]))
"""
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
