"""Every optimiser, found by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_core.contracts import arrays as array_format
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import build_optimizer, known_optimizers
from hpc_trainer import optimizer_state

OPTIMIZERS = known_optimizers()
pytestmark = pytest.mark.parametrize("name", OPTIMIZERS)

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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_quadratic_converges(name: str, momentum: float) -> None:
    parameters = start()
    optimizer = build_optimizer(parameters, OptimizerConfig(name=name, lr=0.02, momentum=momentum))
    steps(parameters, optimizer, 1000)
    assert float(objective(parameters).detach()) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_resumes_bit_for_bit(name: str, momentum: float) -> None:
    config = OptimizerConfig(name=name, lr=0.02, momentum=momentum, weight_decay=0.01)
    calm = start()
    steps(calm, build_optimizer(calm, config), 25)

    before = start()
    optimizer = build_optimizer(before, config)
    steps(before, optimizer, 10)
    stored = array_format.to_bytes(optimizer_state.save(optimizer))

    after = [torch.nn.Parameter(p.detach().clone()) for p in before]
    resumed = build_optimizer(after, config)
    optimizer_state.load(resumed, array_format.from_bytes(stored, origin="state"))
    steps(after, resumed, 15)
    for found, expected in zip(after, calm, strict=True):
        np.testing.assert_array_equal(found.detach().numpy(), expected.detach().numpy())


def test_state_has_the_shapes_of_the_parameters(name: str) -> None:
    parameters = start()
    optimizer = build_optimizer(parameters, OptimizerConfig(name=name, lr=0.1, momentum=0.9))
    steps(parameters, optimizer, 1)
    stored = array_format.from_bytes(array_format.to_bytes(optimizer_state.save(optimizer)), origin="state")
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if torch.is_tensor(value):
                assert stored[f"optimizer/{index}/{key}"].shape == tuple(value.shape)


def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=name):
        build_optimizer(start(), OptimizerConfig(name="no-such-optimizer"))
