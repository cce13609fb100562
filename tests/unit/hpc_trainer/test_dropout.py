"""Dropout by sample: the same mask whoever computes the sample, however the batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fl_core.contracts.errors import ConfigError
from fl_core.learning import seeding
from fl_core.learning.micro_batch import MicroBatch, micro_batch
from hpc_trainer.dropout import KeyedDropout, key_dropout, uniform


def keys(count: int, epoch: int = 1) -> np.ndarray:
    return seeding.example_keys(seeding.key(0, "dropout", epoch), np.arange(count))


def apply(model: nn.Module, x: torch.Tensor, given: np.ndarray) -> torch.Tensor:
    with micro_batch(MicroBatch(keys=given)):
        found: torch.Tensor = model(x)
    return found


def test_masks_follow_the_sample_through_any_split_and_order() -> None:
    model = key_dropout(nn.Sequential(nn.Dropout(0.4), nn.Flatten(2), nn.Dropout(0.2)))
    x, order = torch.ones(12, 3, 5, 5), np.random.default_rng(0).permutation(12)
    whole = apply(model, x, keys(12))
    parts = [apply(model, x[i], keys(12)[i]) for i in np.array_split(np.arange(12), 5)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(apply(model, x, keys(12)[order]), whole[order])
    assert not torch.equal(apply(model, x, keys(12, epoch=2)), whole)
    assert torch.equal(model.eval()(x), x.flatten(2))


def test_rate_scale_and_independence() -> None:
    x = torch.ones(64, 8, 16)
    one, other = (apply(KeyedDropout(0.3, name, channels=False), x, keys(64)) for name in ("a", "b"))
    assert float((one == 0).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(one.mean()) == pytest.approx(1.0, abs=0.03)
    both = float(((one == 0) & (other == 0)).double().mean())
    assert both == pytest.approx(0.09, abs=0.02), "two layers drop independently"
    draws = uniform(torch.arange(100_000))
    np.testing.assert_allclose(np.histogram(draws.numpy(), 10, (0, 1))[0], 10_000, rtol=0.05)


def test_channel_dropout_drops_whole_channels() -> None:
    (layer,) = key_dropout(nn.Sequential(nn.Dropout3d(0.5)))
    found = apply(layer, torch.ones(16, 10, 2, 3, 4), keys(16)).flatten(2)
    assert bool(((found == 0).all(2) | (found == 2).all(2)).all())
    assert 0.3 < float((found[:, :, 0] == 0).double().mean()) < 0.7


@pytest.mark.parametrize("layer", [nn.AlphaDropout(), nn.RReLU(), nn.LSTM(4, 4, 2, dropout=0.1)])
def test_randomness_that_cannot_be_keyed_is_refused_by_its_place(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"0\.0 .*\n.*nn\.Dropout"):
        key_dropout(nn.Sequential(nn.Sequential(layer)))


def test_an_input_that_is_no_batch_of_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch of samples"):
        apply(KeyedDropout(0.5, "a", channels=False), torch.ones(6, 2), keys(3))
