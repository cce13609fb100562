"""Coarse-to-fine schedules: levels by the step, block means beside a plain loop, and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import ConfigError
from fl_core.learning.sources import GENERATED, open_data
from hpc_trainer.coarse import coarsened, factor_at, levels
from hpc_trainer.commands import training_data
from hpc_trainer.trainer import Trainer
from tests.helpers import small_config
from tests.unit.hpc_trainer.ranks import ALONE


@given(st.integers(1, 400), st.sampled_from(["", "2:0.5", "4:0.3,2:0.3", "8:.1,4:.2,2:.3"]))
def test_every_step_has_one_level_and_they_only_get_finer(total: int, text: str) -> None:
    found = [factor_at(text, step, total) for step in range(total)]
    assert found == sorted(found, reverse=True)
    for factor, end in levels(text):
        assert sum(f >= factor for f in found) == pytest.approx(end * total, abs=1)
    assert found[-1] == 1 or total * (1 - (levels(text)[-1][1] if text else 0)) < 1


@pytest.mark.parametrize(
    "text", ["2", "2:1.5", "1:0.5", "2:0.3,4:0.3", "2:0.5,2:0.2", "4:0.6,2:0.4", "2:0.3;", "x:0.1"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.coarse"):
        levels(text)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("channels", [True, False])
def test_blocks_are_means_and_labels_keep_their_middle(axes: int, channels: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    edge, factor = 6, 3
    x = torch.randn((2, 4, *(edge,) * axes), generator=generator, dtype=torch.float64)
    lead = (2, 5) if channels else (2,)
    dense = torch.randn((*lead, *(edge,) * axes), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (*lead, *(edge,) * axes), generator=generator)
    (small,), real = coarsened((x,), dense, factor)
    _, middle = coarsened((x,), labels, factor)
    for place in itertools.product(range(edge // factor), repeat=axes):
        block = (..., *[slice(p * factor, (p + 1) * factor) for p in place])
        over = tuple(range(-axes, 0))
        np.testing.assert_allclose(small[(..., *place)], x[block].mean(dim=over), rtol=1e-12)
        np.testing.assert_allclose(real[(..., *place)], dense[block].mean(dim=over), rtol=1e-12)
        assert torch.equal(middle[(..., *place)], labels[(..., *[p * factor + 1 for p in place])])


def test_inputs_without_places_and_one_target_an_example_stay() -> None:
    image, facts, target = torch.ones(3, 1, 4, 4), torch.ones(3, 7), torch.arange(3)
    (small, same), kept = coarsened((image, facts), target, 2)
    assert small.shape == (3, 1, 2, 2)
    assert same is facts
    assert kept is target
    with pytest.raises(ConfigError, match="an edge of 4 is not a multiple of 3"):
        coarsened((image,), target, 3)


def build(tmp_path: Path, name: str, *overrides: str) -> Trainer:
    app, config = small_config(name, "pretrain.epochs=4", *overrides)
    data = training_data(app, config, open_data(app, config, GENERATED, seed=0), 0)
    return Trainer(app, config, data, processes=ALONE, out=tmp_path, seed=0)


def test_training_starts_coarse_ends_fine_and_is_refused_where_the_model_is_not_convolutional(tmp_path: Path) -> None:
    trainer = build(tmp_path / "a", "seismic_facies", "pretrain.coarse=2:0.5", "data.reference=stored")
    edges: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: edges.append(inputs[0].shape[-1]) if module.training else None
    )
    trainer.run()
    steps, edge = trainer.steps, trainer.config.data.crop
    assert edges == [edge // 2] * (2 * steps) + [edge] * (2 * steps)
    with pytest.raises(ConfigError, match="no spatial axes"):
        build(tmp_path / "b", "toy_regression", "pretrain.coarse=2:0.5")
    with pytest.raises(ConfigError, match=r"a factor of 16"):
        build(tmp_path / "c", "seismic_facies", "pretrain.coarse=16:0.5", "data.reference=stored")
