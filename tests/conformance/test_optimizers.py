"""Every optimiser, found by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_core.contracts import arrays as array_format
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import build_optimizer, known_optimizers
from hpc_trainer import optimizer_state
from tests import optimizer_ranks
from tests.forked import in_ranks

OPTIMIZERS = known_optimizers()
EACH = pytest.mark.parametrize("name", OPTIMIZERS)
# SOAP's library takes its QR decompositions in float32, whatever the parameters are.
TOLERANCE = {"soap": 1e-5}
# Eigenvectors: their signs, their order, and bases of equal eigenvalues are free; and so is what is told in them.
FREE = {"soap": ("Q", "exp_avg_sq"), "kfac": ("kfac_q",)}

SCALES = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
TARGET = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)


def start() -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)),
        torch.nn.Parameter(torch.ones((), dtype=torch.float64)),
    ]


def objective(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """A convex quadratic with its minimum 0 at (TARGET, 0)."""
    return (SCALES * (parameters[0] - TARGET) ** 2).sum() + parameters[1] ** 2


def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad(set_to_none=True)
        objective(parameters).backward()
        optimizer.step()


@EACH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_quadratic_converges(name: str, momentum: float) -> None:
    """The learning rate falls to nothing: steps of a normalised length (LAMB, Shampoo) cannot rest at a constant one."""
    parameters = start()
    optimizer = build_optimizer(parameters, OptimizerConfig(name=name, lr=0.02, momentum=momentum))
    for step in range(1000):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(1.0, 1.5 * (1 - step / 1000))
        steps(parameters, optimizer, 1)
    assert float(objective(parameters).detach()) < 1e-6


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(), nn.Linear(16, 2)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), torch.arange(6) % 2).backward()
        optimizer.step()


@EACH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_resumes_bit_for_bit(name: str, momentum: float) -> None:
    """Interrupted between two decompositions, which come every fourth step."""
    config = OptimizerConfig(name=name, lr=0.02, momentum=momentum, weight_decay=0.01, update_every=4)
    calm = net()
    train(calm, build_optimizer(calm, config), 0, 25)

    before = net()
    optimizer = build_optimizer(before, config)
    train(before, optimizer, 0, 10)
    stored = array_format.to_bytes(optimizer_state.save(optimizer))

    after = net()
    after.load_state_dict(before.state_dict())
    resumed = build_optimizer(after, config)
    optimizer_state.load(resumed, array_format.from_bytes(stored, origin="state"))
    train(after, resumed, 10, 25)
    for found, expected in zip(after.parameters(), calm.parameters(), strict=True):
        np.testing.assert_array_equal(found.detach().numpy(), expected.detach().numpy())


@EACH
def test_state_has_the_shapes_of_the_tensors(name: str) -> None:
    model = net()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.1, momentum=0.9))
    train(model, optimizer, 0, 2)
    stored = array_format.from_bytes(array_format.to_bytes(optimizer_state.save(optimizer)), origin="state")
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if torch.is_tensor(value):
                assert stored[f"optimizer/{index}/{key}"].shape == tuple(value.shape)


@EACH
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=name):
        build_optimizer(start(), OptimizerConfig(name="no-such-optimizer"))


@EACH
def test_frozen_parameters_stay(name: str) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    train(model, build_optimizer(model, OptimizerConfig(name=name, lr=0.1, weight_decay=0.1)), 0, 3)
    assert torch.equal(model[0].weight, before)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_result_does_not_depend_on_the_number_of_processes(world: int, tmp_path: Path) -> None:
    """Unequal and empty shares, weighted losses, float64: parameters and state to 1e-10 of one process's."""
    out = tmp_path / "ranks.npz"
    in_ranks(optimizer_ranks.train_all, world, out)
    alone = {name: optimizer_ranks.train(config, None) for name, config in optimizer_ranks.VARIANTS.items()}
    together = np.load(out, allow_pickle=False)
    begin = {f"model/{k}": v.numpy() for k, v in optimizer_ranks.net().state_dict().items()}
    for name, table in alone.items():
        assert any(not np.allclose(table[k], v, rtol=0, atol=1e-4) for k, v in begin.items()), f"{name} did not move"
        for key, value in table.items():
            if any(part in key for part in FREE.get(name.split()[0], ())):
                continue
            found = together[f"{name}|{key}"]
            np.testing.assert_allclose(found, value, rtol=0, atol=TOLERANCE.get(name, 1e-10), err_msg=f"{name} {key}")
