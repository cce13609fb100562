"""``pretrain --from``: training begins with another run's weights, and the manifest says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fieldfleet.__main__ import main
from fl_core.contracts import checkpoint as checkpoints

SMALL = [f"--set={s}" for s in ("model.hidden=8", "data.clients=4", "data.examples_per_client=10", "pretrain.epochs=1")]


def pretrain(out: Path, *more: str) -> int:
    return main(["pretrain", "toy_regression", "--data", "generated", "--out", str(out), *SMALL, *more])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    assert pretrain(out) == 0
    return out


def test_training_begins_with_the_weights_and_names_their_origin(first: Path, tmp_path: Path) -> None:
    still = ("--set=optimizer.lr=1e-12", "--set=pretrain.average_last=0.0")
    assert pretrain(tmp_path / "second", "--from", str(first), *still, "--seed", "3") == 0
    parent, child = checkpoints.load(first), checkpoints.load(tmp_path / "second")
    assert child.manifest.parent_sha256 == parent.manifest.model_sha256
    assert [entry["model_sha256"] for entry in child.manifest.lineage] == [parent.manifest.model_sha256]
    assert set(parent.manifest.clients_seen) <= set(child.manifest.clients_seen)
    for name, array in parent.arrays.items():
        np.testing.assert_allclose(child.arrays[name], array, atol=1e-6, err_msg=name)


def test_a_run_is_taken_up_from_its_own_start_alone(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "second"
    assert pretrain(out, "--from", str(first)) == 0
    assert pretrain(out) == 2
    assert "start" in capsys.readouterr().err
    assert pretrain(out, "--from", str(first)) == 0


def test_what_does_not_fit_is_refused_before_training(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "wide", "--from", str(first), "--set=model.hidden=9") == 2
    assert "--set model" in capsys.readouterr().err
    assert main(["pretrain", "driver_conflict", "--from", str(first), "--out", str(tmp_path / "other")]) == 2
    assert "is a checkpoint of toy_regression" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
