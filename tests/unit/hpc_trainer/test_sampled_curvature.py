"""What K-FAC's curvature of sampled targets needs, and what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fl_core.contracts.errors import ConfigError
from fl_core.learning import seeding
from hpc_trainer.refusals import refuse_what_draws_no_targets
from simulations.simulate import simulate
from tests.helpers import small_config


def test_sampled_curvature_is_refused_where_nobody_or_nothing_can_sample() -> None:
    app, sampled = small_config("driver_conflict", "optimizer.name=kfac", "optimizer.fisher=sampled")
    refuse_what_draws_no_targets(app, sampled)
    for key in ("activation_checkpointing", "compile"):
        _, config = small_config(
            "driver_conflict", "optimizer.name=kfac", "optimizer.fisher=sampled", f"pretrain.{key}=true"
        )
        with pytest.raises(ConfigError, match=key):
            refuse_what_draws_no_targets(app, config)
    other, config = small_config("plant_anomaly", "optimizer.name=kfac", "optimizer.fisher=sampled")
    with pytest.raises(ConfigError, match="plant_anomaly does not say"):
        refuse_what_draws_no_targets(other, config)
    with pytest.raises(ConfigError, match="only pretraining"):
        simulate(app, sampled, app.generate(sampled, 0), start=None, num_rounds=1, seed=0, out=Path("never"))


def test_the_toys_sampled_curvature_is_its_second_derivative() -> None:
    app, config = small_config("toy_regression")
    outputs = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    draw = app.sample_function()
    assert draw is not None
    targets = draw(outputs.detach(), seeding.example_keys(1, np.arange(len(outputs))), config)
    (score,) = torch.autograd.grad(app.loss_function()(outputs, targets, config)[0], outputs)
    assert float((score**2).mean()) == pytest.approx(2.0, rel=0.03)
