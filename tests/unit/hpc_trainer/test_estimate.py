"""Estimates against counts made by hand, real optimisers, and a real process."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.estimate import CASES, measured
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.learning.application import application
from fl_core.optimizers import build_optimizer, known_optimizers
from hpc_trainer.layout import PARTS
from hpc_trainer.performance import tracking
from hpc_trainer.performance.estimate import estimate, state_bytes
from hpc_trainer.placement.channels import Plan
from tests.helpers import fieldfleet

ESTIMATED = [n for n in known_optimizers() if n != "shampoo"]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 30))


def test_the_private_tools_count_what_they_should() -> None:
    """Contract: one linear layer, whose bytes and operations are known."""
    with tracking.unallocated():
        model = nn.Linear(1000, 500, bias=False)
        found = tracking.track(
            model,
            [torch.zeros(64, 1000)],
            torch.zeros(64, 500),
            lambda o, t: (((o - t) ** 2).sum(), torch.ones(())),
            "cpu",
        )
    assert found.peak["parameters"] == 4 * 1000 * 500
    assert found.forward_flops == 2 * 64 * 1000 * 500
    assert found.backward_flops == 2 * 64 * 1000 * 500  # the input needs no gradient
    assert found.total >= 4 * (1000 * 500 + 64 * 1000 + 64 * 500)


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_state_of_every_optimiser_is_counted(name: str) -> None:
    config = OptimizerConfig(name=name, lr=0.01, momentum=0.9, max_factor=40)
    model = net()
    optimizer = build_optimizer(model, config)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 6, 6)).square().mean().backward()
        optimizer.step()
    held = 0
    for entries in optimizer.state_dict()["state"].values():
        for value in entries.values():
            tensors = value if isinstance(value, list) else [value]
            held += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t) and t.ndim)
    assert state_bytes(model, config) == held


def test_an_optimiser_of_unknown_memory_is_refused() -> None:
    with pytest.raises(InputError, match="shampoo"):
        state_bytes(net(), OptimizerConfig(name="shampoo"))


@pytest.mark.parametrize("name", ["toy_regression", "driver_conflict"])
def test_shares_fall_with_the_world(name: str) -> None:
    app = application(name)
    overrides = ["pretrain.batch_size=16"]
    one = estimate(app, "default", overrides, world=1, parallel="ddp")
    many = {p: estimate(app, "default", overrides, world=4, parallel=p) for p in ("ddp", "fsdp")}
    assert one["parameters"] == sum(p.numel() for p in app.build_model(app.configure()).parameters() if p.requires_grad)
    assert one["message_bytes"] == 0
    assert one["flops"]["forward"] == pytest.approx(4 * many["ddp"]["flops"]["forward"])
    assert many["ddp"]["message_bytes"] == int(1.5 * 4 * one["parameters"])
    assert many["fsdp"]["memory_bytes"]["optimizer"] <= many["ddp"]["memory_bytes"]["optimizer"] / 4


def test_each_dimension_of_the_mesh_cuts_what_it_says() -> None:
    app, overrides = application("seismic_facies"), ["model.norm=group", "pretrain.batch_size=4", "model.width=32"]
    one = estimate(app, "default", overrides, world=1, parallel="ddp")
    two = {m: estimate(app, "default", overrides, world=2, parallel="ddp", mesh=f"{m}=2") for m in PARTS}
    scheduled = [*overrides, "pretrain.schedule_of_stages=1f1b"]
    two["pipeline"] = estimate(app, "default", scheduled, world=2, parallel="ddp", mesh="pipeline=2")
    memory = {m: found["memory_bytes"] for m, found in two.items()}
    whole = one["memory_bytes"]
    assert memory["spatial"]["activations"] == pytest.approx(whole["activations"] / 2, rel=0.01)
    assert 0 < memory["spatial"]["halo"] < 0.1 * whole["activations"]
    assert memory["spatial"]["optimizer"] == whole["optimizer"]
    assert memory["tensor"]["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)
    assert memory["tensor"]["activations"] == whole["activations"]
    assert memory["pipeline"]["optimizer"] < whole["optimizer"]
    single = estimate(app, "default", [*overrides, "pretrain.batch_size=1"], world=1, parallel="ddp")
    # four micro-batches of one sample, two in flight of half
    assert memory["pipeline"]["activations"] == single["memory_bytes"]["activations"]
    assert all(found["message_bytes"] > 0 for m, found in two.items() if m != "pipeline")
    sharded = estimate(app, "default", overrides, world=2, parallel="fsdp", mesh="spatial=2")["memory_bytes"]
    assert sharded["optimizer"] == whole["optimizer"] // 2
    assert sharded["activations"] == memory["spatial"]["activations"]


def test_the_parameters_that_a_rank_of_tensor_parallelism_holds() -> None:
    """By hand: the pair's weights and what lies between are halved, the second bias is whole; the odd head is cut too."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Flatten(), nn.Linear(4, 1))
    cut = sum(p.numel() for p in Plan.of(model, 2).cut_parameters())
    assert cut == 24 + 6 + 24  # weight and bias of the first, weight of the second; one output is not cut


def test_the_command_prints_an_estimate_of_a_model_that_fits_nowhere_here() -> None:
    done = fieldfleet(
        "estimate", "--app", "plant_disease", "--world", "64", "--parallel", "fsdp", "--json",
        "--set", "model.width=256", "--set", "model.blocks=2", "--set", "pretrain.batch_size=65536", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["batch"]["process"] == 1024
    assert document["memory_bytes"]["total"] > 20e9


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_peak_is_within_a_tenth_of_a_real_process(number: int) -> None:
    case = CASES[number]
    predicted = estimate(application(case.application), "default", case.overrides, world=1, parallel="ddp")
    real = measured(case)
    print(f"{case}: predicted {predicted['memory_bytes']}, measured {real / 1e6:.0f} MB")
    assert real > 500e6
    assert predicted["memory_bytes"]["total"] == pytest.approx(real, rel=0.1)
