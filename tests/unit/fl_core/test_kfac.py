"""K-FAC against Fisher matrices written out from each example's own gradient, and what surrounds it."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import build_optimizer
from fl_core.optimizers.kfac import KFAC, Cut, spread

DAMPING = 0.05
PLAIN = OptimizerConfig(name="kfac", lr=1.0, damping=DAMPING, kl_clip=0.0, decay=0.0, update_every=1)

# Layer, shape of one example. Transposed ones do not overlap here: their patches of uncorrelated gradients are so too.
LAYERS = {
    "linear": (nn.Linear(3, 2), (3,)),
    "linear without bias": (nn.Linear(3, 2, bias=False), (3,)),
    "linear over positions": (nn.Linear(2, 2), (3, 2)),
    "conv1d": (nn.Conv1d(2, 2, 3, stride=2, padding=1), (2, 5)),
    "conv1d dilated, circular": (nn.Conv1d(1, 2, 2, dilation=2, padding=1, padding_mode="circular"), (1, 4)),
    "conv1d same": (nn.Conv1d(1, 2, 3, padding="same"), (1, 3)),
    "conv2d": (nn.Conv2d(1, 2, 2), (1, 3, 3)),
    "conv2d in groups": (nn.Conv2d(4, 2, (1, 2), groups=2), (4, 2, 2)),
    "conv2d depthwise": (nn.Conv2d(2, 2, 2, groups=2, bias=False), (2, 3, 2)),
    "conv3d": (nn.Conv3d(1, 2, (1, 2, 2)), (1, 2, 2, 2)),
    "transposed 1d": (nn.ConvTranspose1d(2, 1, 2, stride=2), (2, 2)),
    "transposed 2d": (nn.ConvTranspose2d(1, 2, 2, stride=2, bias=False), (1, 2, 1)),
    "transposed 2d in groups": (nn.ConvTranspose2d(2, 2, (2, 1), stride=(2, 1), groups=2), (2, 1, 2)),
    "transposed 3d": (nn.ConvTranspose3d(1, 1, (1, 2, 2), stride=(1, 2, 2)), (1, 1, 1, 2)),
}


def signs(size: int) -> Tensor:
    """(n, size) of +1 and -1, every two columns orthogonal: uncorrelated gradients, exactly."""
    n = 1 << (size - 1).bit_length()
    return torch.from_numpy(scipy.linalg.hadamard(n)[:, :size].astype(np.float64))


def design(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs (N, ...) and gradients (N, ...) of the output: every input with every gradient, so that they are independent."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    out = layer(inputs[:1]).shape[1:]
    scales = torch.ones(out, dtype=torch.float64)
    axis = -1 if isinstance(layer, nn.Linear) else 0
    for channel in range(out[axis]):  # channels differ in scale, positions do not
        scales.select(axis, channel).mul_(0.5 + channel)
    rows = signs(scales.numel()).reshape(-1, *out) * scales
    pairs = list(itertools.product(range(len(inputs)), range(len(rows))))
    return inputs[[i for i, _ in pairs]], rows[[j for _, j in pairs]]


def fisher(layer: nn.Module, inputs: Tensor, slopes: Tensor) -> Tensor:
    """(P, P): the mean over examples of the outer product of each one's own gradient."""
    rows = []
    for x, c in zip(inputs, slopes, strict=True):
        gradients = torch.autograd.grad((layer(x[None])[0] * c).sum(), list(layer.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    stacked = torch.stack(rows)
    return stacked.T @ stacked / len(rows)


@pytest.mark.parametrize("fisher_of", ["empirical", "sampled"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_solves_with_the_fisher_matrix_of_each_layer(name: str, fisher_of: str) -> None:
    """Where activations and gradients are independent, and gradients uncorrelated between positions, K-FAC is exact."""
    layer, shape = LAYERS[name]
    layer = layer.double()
    torch.manual_seed(1)
    inputs, slopes = design(layer, shape)
    exact = fisher(layer, inputs, slopes)
    transposed_bias = name.startswith("transposed") and layer.bias is not None
    if transposed_bias:  # a block of its own
        exact[-layer.bias.numel() :, : -layer.bias.numel()] = 0
        exact[: -layer.bias.numel(), -layer.bias.numel() :] = 0
    optimizer = build_optimizer(layer, replace(PLAIN, fisher=fisher_of))
    begin = torch.cat([p.detach().reshape(-1) for p in layer.parameters()])
    # The gradient of the mean of linear losses: N times the factors, so that only the right scaling solves exactly.
    out = layer(inputs)
    loss = (out * slopes).sum() / len(inputs)
    if fisher_of == "sampled":  # what is learned from counts for nothing
        optimizer.sample(loss)
        loss = out.square().sum()
    loss.backward()
    torch.manual_seed(2)
    target = torch.randn_like(begin)
    pieces = target.split([p.numel() for p in layer.parameters()])
    for parameter, piece in zip(layer.parameters(), pieces, strict=True):
        parameter.grad = piece.reshape(parameter.shape).clone()
    optimizer.step()
    moved = begin - torch.cat([p.detach().reshape(-1) for p in layer.parameters()])
    expected = torch.linalg.solve(exact + DAMPING * torch.eye(len(exact), dtype=torch.float64), target)
    np.testing.assert_allclose(moved.numpy(), expected.numpy(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.LayerNorm(3), (2, 3)),
        (nn.BatchNorm2d(3), (3, 2, 2)),
        (nn.LayerNorm(3, bias=False), (3,)),
    ],
)
def test_normalisations_have_exact_blocks_unit_by_unit(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    inputs, slopes = torch.randn(5, *shape).double(), torch.randn(5, *shape).double()
    optimizer = build_optimizer(layer, PLAIN)
    gradients = []
    for i in range(len(inputs)):  # through the whole batch: batch norm has no example of its own
        loss = (layer(inputs)[i] * slopes[i]).sum()
        gradients.append(torch.stack(torch.autograd.grad(loss, list(layer.parameters()))))
    optimizer._sums = {}
    each = torch.stack(gradients)  # (N, 2 or 1, units)
    before = torch.stack([p.detach().clone() for p in layer.parameters()])
    ((layer(inputs) * slopes).sum() / len(inputs)).backward()
    mean = torch.stack([p.grad.clone() for p in layer.parameters()])
    optimizer.step()
    moved = before - torch.stack([p.detach() for p in layer.parameters()])
    for unit in range(each.shape[2]):
        block = each[:, :, unit].T @ each[:, :, unit] / len(inputs) + DAMPING * torch.eye(each.shape[1]).double()
        expected = torch.linalg.solve(block, mean[:, unit])
        np.testing.assert_allclose(moved[:, unit].numpy(), expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, dilation=1)])
def test_overlapping_transposed_convolutions_gather_the_patches_of_the_gradient(layer: nn.ConvTranspose2d) -> None:
    """sum_t x_t patch_t(gy)^T is autograd's gradient of the weights: the patches are the right ones."""
    layer = layer.double()
    x, gy = torch.randn(4, 2, 3, 4).double(), torch.randn(4, 3, 6, 8).double()
    optimizer = build_optimizer(layer, PLAIN)
    (layer(x) * gy).sum().backward()
    _, factor, _ = optimizer._sums[0]
    kept = nn.functional.pad(gy, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)[:, :, :3, :4]
    columns = kept.permute(0, 2, 3, 1, 4, 5).reshape(4, 12, 27)
    weights = torch.einsum("nct,ntp->cp", x.reshape(4, 2, 12), columns).reshape(layer.weight.shape)
    np.testing.assert_allclose(layer.weight.grad.numpy(), weights.numpy(), rtol=1e-10)
    np.testing.assert_allclose(factor[0].numpy(), (torch.einsum("ntp,ntq->pq", columns, columns) / 12).numpy())


def test_micro_batches_add_up_and_examples_of_weight_zero_do_not_count() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))

    def moved(parts: list[list[int]], extra: bool) -> Tensor:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = build_optimizer(model, PLAIN)
        for part in parts:
            losses = nn.functional.cross_entropy(model(x[part]), y[part], reduction="none")
            weight = torch.ones(len(part)).double()
            if extra:
                weight[0] = 0
            ((losses * weight).sum() / 6).backward()
        optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    whole = moved([[0, 1, 2, 3, 4, 5]], False)
    for parts, extra in (([[0, 1], [2, 3, 4, 5]], False), ([[3, 0, 1], [1, 2, 3], [5, 4, 5]], True)):
        np.testing.assert_allclose(moved(parts, extra).numpy(), whole.numpy(), atol=1e-12)


def test_the_clip_bounds_the_change_of_the_predictions() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4).double()
    steps = []
    for clip in (0.0, 1e-6):
        torch.manual_seed(1)
        model = nn.Linear(4, 2).double()
        optimizer = build_optimizer(
            model, OptimizerConfig(name="kfac", lr=0.5, kl_clip=clip, damping=1e-4, update_every=1)
        )
        before = model.weight.detach().clone()
        model(x).square().mean(dim=0).sum().backward()
        gradient = model.weight.grad.clone()
        optimizer.step()
        steps.append((model.weight.detach() - before, gradient))
    ratio = float(steps[1][0].norm() / steps[0][0].norm())
    assert ratio < 1e-2
    np.testing.assert_allclose(steps[1][0].numpy(), (steps[0][0] * ratio).numpy(), rtol=1e-9)


def test_blocks_of_one_are_a_diagonal_and_large_blocks_the_whole() -> None:
    factor = torch.randn(2, 5, 5)
    assert torch.equal(Cut.of(5, 100).blocks(factor)[:, 0], factor)
    assert torch.equal(Cut.of(5, 1).blocks(factor)[..., 0, 0], factor.diagonal(dim1=1, dim2=2))
    cut = Cut.of(5, 2)
    assert (cut.count, cut.size) == (3, 2)
    found = cut.blocks(factor)
    assert torch.equal(found[:, 1], factor[:, 2:4, 2:4])
    assert torch.equal(found[:, 2, 0, 0], factor[:, 4, 4])
    assert float(found[:, 2, 1].abs().max()) == 0


def test_a_bound_on_factors_bounds_the_memory() -> None:
    def held(largest: int) -> int:
        model = nn.Linear(100, 60)
        optimizer = build_optimizer(model, OptimizerConfig(name="kfac", lr=0.1, max_factor=largest))
        model(torch.randn(8, 100)).square().mean().backward()
        optimizer.step()
        return sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))

    assert held(10_000) == 2 * (101**2 + 60**2) + 161
    assert held(20) < held(10_000) / 4
    assert held(1) == 3 * 161


@given(st.lists(st.floats(0.1, 1e9), max_size=40), st.integers(1, 9))
def test_work_is_spread_by_cost(costs: list[float], world: int) -> None:
    owners = spread(costs, world)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(world)]
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(world))
    assert max(loads, default=0.0) <= sum(costs) / world + max(costs, default=0.0) + 1e-6


def test_hooks_end_with_the_optimiser_and_evaluation_measures_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    optimizer = build_optimizer(model, PLAIN)
    assert isinstance(optimizer, KFAC)
    model.eval()
    model(torch.randn(4, 3)).sum().backward()
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3))
    assert not optimizer._sums
    model(torch.randn(4, 3)).sum().backward()
    assert set(optimizer._sums) == {0, 1}
    del optimizer
    gc.collect()
    assert not any(m._forward_hooks for m in model.modules())


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32 or float64"):
        build_optimizer(nn.Linear(2, 2).bfloat16(), PLAIN)
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer, replace(PLAIN, fisher="sampled"))
    layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConfigError, match="nobody sampled"):
        optimizer.step()


def test_sampling_leaves_gradients_alone_and_reaches_layers_before_activations_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    optimizer = build_optimizer(model, replace(PLAIN, fisher="sampled"))
    assert isinstance(optimizer, KFAC)
    out = model(torch.randn(5, 3))
    optimizer.sample(out.square().sum())
    assert set(optimizer._sums) == {0, 1}
    assert all(p.grad is None for p in model.parameters())
    measured = optimizer._sums[0][1].clone()
    out.sum().backward()
    assert torch.equal(optimizer._sums[0][1], measured)
    optimizer.scaled(3.0)
    torch.testing.assert_close(optimizer._sums[0][1], 9 * measured)


def test_a_loss_that_is_not_finite_leaves_the_curvature_alone() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, PLAIN)
    for value in (1.0, float("nan")):
        optimizer.zero_grad()
        (model(torch.randn(4, 3)) * value).sum().backward()
        optimizer.step()
    assert all(bool(torch.isfinite(v).all()) for k, v in optimizer.state[model.weight].items() if k.startswith("kfac"))
