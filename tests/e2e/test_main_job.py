"""The main job with the real commands: pretrain -> federate -> export -> publish -> update -> infer -> evaluate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.bundle import open_bundle
from fl_core.contracts.checkpoint import load
from tests.helpers import ROOT

DEVICES = ("device-1", "device-2")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "fieldfleet", "demo", "--app", "toy_regression", "--devices", "2", "--rounds", "3"]
    done = subprocess.run(
        [*command, "--out", str(out), "--json"], capture_output=True, text=True, cwd=ROOT, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, json.loads(done.stdout)


def test_everything_the_demo_promises_is_there(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    for name in ("pretrained", "global", "bundle"):
        assert (out / name).is_dir()
    assert json.loads((out / "report.json").read_text()) == results
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "http://" not in page
    assert "https://" not in page


def test_lineage_reaches_from_the_device_to_pretraining(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    pretrained, federated, bundle = load(out / "pretrained"), load(out / "global"), open_bundle(out / "bundle")
    assert federated.manifest.parent_sha256 == pretrained.manifest.model_sha256
    assert bundle.manifest.parent_sha256 == federated.manifest.model_sha256
    assert next(s["stage"] for s in bundle.manifest.lineage) == "pretrain"
    for name in DEVICES:
        current = open_bundle(own_folder(out, name) / "slots" / "current", only=("manifest.json",))
        assert current.manifest.parent_sha256 == federated.manifest.model_sha256
    assert results["federation"][-1]["round"] == 3


def test_no_client_is_on_two_sides(demo: tuple[Path, dict[str, Any]]) -> None:
    out, results = demo
    seen = set(load(out / "pretrained").manifest.clients_seen)
    assert len(seen) == results["data"]["shares"]["centre"]
    rows = [
        {line.split(",")[0] for line in (f / "rows.csv").read_text().splitlines()[1:]}
        for f in sorted((out / "data").iterdir())
    ]
    assert sum(map(len, rows)) == len(set.union(*rows)) == results["data"]["clients"]


def test_the_federation_improved_on_unseen_clients(demo: tuple[Path, dict[str, Any]]) -> None:
    _, results = demo
    error = {k: v["metrics"]["mean_squared_error"] for k, v in results["evaluation"].items()}
    assert error["global"] < error["pretrained"]
    assert error["bundle"] == pytest.approx(error["global"], rel=0.05)


def test_each_device_inferred_with_the_new_model(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    for name in DEVICES:
        assert list((own_folder(out, name) / "predictions").glob("*.csv"))


def test_private_keys_are_private(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    found = [*out.rglob("*.key")]
    assert found
    assert all(not path.stat().st_mode & 0o077 for path in found)


def own_folder(out: Path, device: str) -> Path:
    """Of the application, in the device's home."""
    return out / "agents" / device / "applications" / "toy_regression"
