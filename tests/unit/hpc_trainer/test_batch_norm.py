"""Synchronised and ghost batch norm in one process, held to torch's in float64; in several, see ``test_parallel.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fl_core.contracts.errors import ConfigError
from fl_core.learning.micro_batch import MicroBatch, micro_batch, recomputation
from fl_core.learning.normalization import GHOST_BATCH, GhostBatchNorm, norm
from hpc_trainer.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from hpc_trainer.layout import arrange
from hpc_trainer.refusals import refuse_what_breaks_integrity
from tests.helpers import small_config

SHAPES = {1: (6, 5), 2: (6, 5, 4, 3), 3: (3, 5, 2, 4, 3)}


def pair(dims: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(dims)
    usual = norm("batch", 5, dims=dims).double()
    nn.init.normal_(usual.weight)
    nn.init.normal_(usual.bias)
    ours = norm("batch", 5, dims=dims).double()
    ours.load_state_dict(usual.state_dict())
    return usual, synchronise_batch_norm(nn.Sequential(ours), None)[0]


@pytest.mark.parametrize("dims", SHAPES)
def test_outputs_gradients_and_statistics_are_torchs(dims: int) -> None:
    usual, ours = pair(dims)
    assert isinstance(ours, SynchronisedBatchNorm)
    for training in (True, True, False):
        usual.train(training), ours.train(training)
        x = [torch.randn(SHAPES[dims], dtype=torch.float64).mul(3).add(7)]
        x = [t.clone().requires_grad_() for t in x * 2]
        for layer, given in zip((usual, ours), x, strict=True):
            layer.zero_grad()
            (layer(given) ** 3).sum().backward()
        torch.testing.assert_close(x[1].grad, x[0].grad, rtol=1e-11, atol=1e-11)
        for (name, a), b in zip(usual.state_dict().items(), ours.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-13, atol=1e-13, msg=name)
        for a, b in zip(usual.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-11, atol=1e-10)


def test_float32_keeps_the_digits_of_large_means() -> None:
    x = (1000 + torch.randn(4, 3, 64, 64, dtype=torch.float64)).float()
    ours = synchronise_batch_norm(norm("batch", 3, dims=2), None)
    found = ours(x)
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert float((found - exact).detach().abs().max()) < 5e-4
    assert found.dtype == torch.float32


def test_one_value_a_channel_uses_running_statistics_and_leaves_them() -> None:
    usual, ours = pair(1)
    for layer in (usual, ours):
        layer.train()
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        x = torch.arange(5.0, dtype=torch.float64)[None]
        expected = (x - layer.running_mean) / torch.sqrt(layer.running_var + layer.eps) * layer.weight + layer.bias
        torch.testing.assert_close(layer(x), expected)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name])


def test_samples_that_only_fill_the_shape_do_not_count() -> None:
    usual, ours = pair(2)
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    with micro_batch(MicroBatch(real=4)):
        padded = ours(torch.cat([x[:4], 1e6 * x[4:]]))
    torch.testing.assert_close(padded[:4], usual(x[:4]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.running_var, usual.running_var)


def test_a_repeated_forward_pass_moves_no_statistics() -> None:
    for layer in (pair(2)[1], norm("ghost", 5, dims=2).double()):
        x = torch.randn(SHAPES[2], dtype=torch.float64)
        layer(x)
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        with recomputation():
            layer(x)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_each_ghost_batch_is_normalised_alone_and_statistics_move_once() -> None:
    ghost = norm("ghost", 5, dims=2).double()
    x = torch.randn(2 * GHOST_BATCH + 3, 5, 4, 3, dtype=torch.float64)
    parts = x.split(GHOST_BATCH)
    expected = [nn.functional.batch_norm(p, None, None, training=True) for p in parts]
    torch.testing.assert_close(ghost(x), torch.cat(expected))
    weights = np.array([len(p) for p in parts]) / len(x)
    var = sum(float(w) * p.var(dim=(0, 2, 3)) for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(ghost.running_var, 0.9 + 0.1 * var)
    torch.testing.assert_close(ghost.running_mean, 0.1 * x.mean(dim=(0, 2, 3)))
    assert int(ghost.num_batches_tracked) == 1
    ghost.eval()
    assert ghost(x[:1]).shape == x[:1].shape


def test_a_model_of_ghost_norms_is_not_synchronised() -> None:
    assert isinstance(synchronise_batch_norm(norm("ghost", 4, dims=2), None), GhostBatchNorm)


@pytest.mark.parametrize(
    ("overrides", "micro_batches", "message"),
    [
        (("model.norm=batch",), 2, r"2 micro-batches.*\n.*model\.norm=ghost"),
        (("model.norm=ghost", "pretrain.micro_batch=12"), 2, r"micro_batch = 12 .*\n.*multiple of 8"),
        (("pretrain.precision=bf16",), 1, "bf16"),
    ],
)
def test_what_breaks_integrity_is_refused(overrides: tuple[str, ...], micro_batches: int, message: str) -> None:
    app, config = small_config("toy_regression", "model.hidden=8", *overrides)
    layout = arrange(config.pretrain, 0, 1)
    with pytest.raises(ConfigError, match=message):
        refuse_what_breaks_integrity(app.build_model(config), config, layout, micro_batches, torch.float64)
