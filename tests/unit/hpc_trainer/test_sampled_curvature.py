"""What K-FAC's curvature of sampled targets needs, and what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fl_core.contracts.errors import ConfigError
from fl_core.contracts.installed import known_applications
from fl_core.learning import seeding
from fl_core.learning.application import application
from fl_core.learning.sources import open_data
from fl_core.optimizers.kfac import KFAC
from hpc_trainer.commands import training_data
from hpc_trainer.processes import Processes
from hpc_trainer.refusals import refuse_what_draws_no_targets
from hpc_trainer.trainer import Trainer
from simulations.simulate import simulate
from tests.helpers import small_config


def test_sampled_curvature_is_refused_where_nobody_or_nothing_can_sample() -> None:
    app, sampled = small_config("driver_conflict", "optimizer.name=kfac", "optimizer.fisher=sampled")
    refuse_what_draws_no_targets(app, sampled)
    _, config = small_config(
        "driver_conflict", "optimizer.name=kfac", "optimizer.fisher=sampled", "pretrain.compile=true"
    )
    with pytest.raises(ConfigError, match=r"pretrain\.compile"):
        refuse_what_draws_no_targets(app, config)
    other, config = small_config("plant_anomaly", "optimizer.name=kfac", "optimizer.fisher=sampled")
    with pytest.raises(ConfigError, match="plant_anomaly does not say"):
        refuse_what_draws_no_targets(other, config)
    with pytest.raises(ConfigError, match="only pretraining"):
        simulate(app, sampled, app.generate(sampled, 0), start=None, num_rounds=1, seed=0, out=Path("never"))


@pytest.mark.parametrize("name", [name for name in known_applications() if application(name).sample])
def test_targets_that_the_model_draws_have_a_score_of_mean_zero(name: str) -> None:
    """The expected gradient of their loss is zero, within five standard errors, as that of a log-likelihood's."""
    app, draws = application(name), 20_000
    config, sample = app.configure(app.verify), app.sample_function()
    assert sample is not None
    torch.manual_seed(0)
    rows = [torch.randn(1, *spec.shape[1:]).double() for spec in app.outputs(config)]
    outputs = tuple(row.repeat(draws, *(1,) * (row.dim() - 1)).requires_grad_() for row in rows)
    given = outputs if len(outputs) > 1 else outputs[0]
    keys = seeding.example_keys(1, np.arange(draws))
    targets = sample(tuple(o.detach() for o in outputs) if len(outputs) > 1 else outputs[0].detach(), keys, config)
    numerator, _ = app.loss_function()(given, targets, config)
    for score in torch.autograd.grad(numerator, outputs):
        assert float(score.std(0).max()) > 0.1
        assert bool((score.mean(0).abs() <= 5 * score.std(0) / draws**0.5).all())


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_recomputed_activations_give_the_same_steps(fisher: str, tmp_path: Path) -> None:
    """Two backward passes through a graph that is recomputed for each; float64, to 1e-12."""
    torch.set_num_threads(1)
    found = []
    for recompute in ("false", "true"):
        app, config = small_config(
            *("driver_conflict", "optimizer.name=kfac", f"optimizer.fisher={fisher}", "optimizer.update_every=2"),
            *(f"pretrain.activation_checkpointing={recompute}", "pretrain.epochs=1", "pretrain.batch_size=16"),
        )
        data = training_data(app, config, open_data(app, config, "generated", seed=0), 0)
        trainer = Trainer(
            app, config, data, processes=Processes(0, 1, torch.device("cpu")), out=tmp_path / recompute, seed=0,
            dtype=torch.float64,
        )  # fmt: skip
        trainer.run()
        assert isinstance(trainer.optimizer, KFAC)
        assert not trainer.optimizer._edges, "nothing keeps a recomputed graph alive"
        found.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-12)


def test_the_toys_sampled_curvature_is_its_second_derivative() -> None:
    app, config = small_config("toy_regression")
    outputs = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    draw = app.sample_function()
    assert draw is not None
    targets = draw(outputs.detach(), seeding.example_keys(1, np.arange(len(outputs))), config)
    (score,) = torch.autograd.grad(app.loss_function()(outputs, targets, config)[0], outputs)
    assert float((score**2).mean()) == pytest.approx(2.0, rel=0.03)
