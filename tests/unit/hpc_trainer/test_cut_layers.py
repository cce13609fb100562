"""Layers on cut volumes, and cut layers, equal whole ones, whatever their windows and wherever the cuts are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.errors import ConfigError
from fl_core.learning.application import application
from hpc_trainer.layout import mesh_sizes
from hpc_trainer.refusals import refuse_arrangement
from tests.forked import in_ranks
from tests.unit.hpc_trainer.layer_ranks import compare_all


def together(world: int, tmp_path: Path) -> dict[str, Any]:
    in_ranks(compare_all, world, tmp_path / "found.json")
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def check(world: int, tmp_path: Path) -> None:
    found = together(world, tmp_path)
    assert len(found["deviations"]) > 50
    assert {name: d for name, d in found["deviations"].items() if d > 1e-12} == {}
    assert len(found["channels"]) > 10
    assert {name: d for name, d in found["channels"].items() if d > 1e-12} == {}
    assert found["rows"] < 1e-12
    for name, said in found["refused"].items():
        assert said.startswith("layer '1': "), (name, said)


@pytest.mark.timeout(300)
def test_every_layer_on_two_processes(tmp_path: Path) -> None:
    check(2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [3, 4])
def test_every_layer_on_more_processes(world: int, tmp_path: Path) -> None:
    check(world, tmp_path)


@pytest.mark.parametrize(
    ("parallel", "mesh", "world", "expected"),
    [
        ("ddp", "spatial=2", 4, {"data": 2, "spatial": 2}),
        ("fsdp", "spatial=2", 2, {"spatial": 2}),
        ("fsdp", "replicate=2", 4, {"replicate": 2, "shard": 2}),
        ("hsdp", "", 4, {"replicate": 2, "shard": 2}),
        ("ddp", "data=2,spatial=2", 1, {}),
        ("ddp", "", 3, {"data": 3}),
    ],
)
def test_the_rest_of_the_processes_is_what_parallel_says(
    parallel: str, mesh: str, world: int, expected: dict[str, int]
) -> None:
    config = application("toy_regression").configure([f"pretrain.parallel={parallel}", f"pretrain.mesh={mesh}"])
    found = mesh_sizes(config.pretrain, world)
    assert {k: v for k, v in found.items() if v > 1} == expected


@pytest.mark.parametrize(
    ("mesh", "world", "message"),
    [
        ("spatial=3", 4, "multiples of 3 processes, 4 were started"),
        ("data=2,spatial=1", 4, "made for 2 processes, 4"),
        ("depth=2", 4, "'depth=2' is not a dimension.*\n.*spatial"),
        ("spatial=0", 4, "not a dimension with its size"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: str, world: int, message: str) -> None:
    config = application("toy_regression").configure([f"pretrain.mesh={mesh}"])
    with pytest.raises(ConfigError, match=message):
        mesh_sizes(config.pretrain, world)


@pytest.mark.parametrize(
    ("mesh", "override", "message"),
    [
        ("spatial=2", "optimizer.name=kfac", "spatial"),
        ("spatial=2", "pretrain.compile=true", "spatial"),
        ("tensor=2", "pretrain.compile=true", "tensor"),
        ("tensor=2", "optimizer.name=lamb", "whole parameters"),
        ("tensor=2", "pretrain.parallel=fsdp", "tensor.*exclude each other"),
        ("tensor=2,spatial=2", "pretrain.parallel=ddp", "spatial and tensor exclude"),
        ("pipeline=2,spatial=2", "model.norm=group", "spatial and pipeline exclude"),
        ("pipeline=2", "model.norm=batch", "one micro-batch at a time\n.*model.norm=group"),
        ("pipeline=2", "pretrain.parallel=hsdp", "pipeline.*exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_start(mesh: str, override: str, message: str) -> None:
    config = application("seismic_facies").configure([f"pretrain.mesh={mesh}", override])
    with pytest.raises(ConfigError, match=message):
        refuse_arrangement(config, mesh_sizes(config.pretrain, 4))
