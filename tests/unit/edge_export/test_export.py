"""Checkpoint -> bundle, through the real exporter, quantiser and runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edge_export.export import against_torch, export_checkpoint
from fieldfleet.__main__ import main
from fl_clients.edge.slots import current_bundle
from fl_clients.edge.updater import update
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.bundle import SUMS_NAME, open_bundle
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import ConfigError, DataError, GoalMissed, InputError, IntegrityError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.delivery.publication import publish_bundle
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from fl_core.learning.torch_arrays import predict as predict_torch
from fl_core.runtime.golden import golden_check, read_golden
from fl_core.runtime.session import predict
from tests.helpers import ROOT, fieldfleet, run_python, small_config


def make_checkpoint(folder: Path, name: str, *overrides: str) -> Path:
    """A checkpoint of the untrained model."""
    app, config = small_config(name, *overrides)
    manifest = CheckpointManifest(
        application=name, config=to_table(config), stage="pretrain", step=3, metrics={"r2": 0.5}, clients_seen=["c"]
    )
    Checkpoint(manifest, get_arrays(app.build_model(config))).save(folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("toy") / "ckpt", "toy_regression")


@pytest.fixture(scope="module")
def exported(toy: Path) -> Path:
    """The toy checkpoint's bundle; tests do not change it."""
    export_checkpoint(toy, toy.parent / "bundle")
    return toy.parent / "bundle"


@pytest.fixture(scope="module")
def conflict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of driver_conflict for two targets. Trained a little: on an untrained model every ranking is chance."""
    work = tmp_path_factory.mktemp("conflict")
    small = ["--set", "pretrain.epochs=2", "--set", "data.clients=12"]
    trained = fieldfleet("pretrain", "driver_conflict", "--data", "generated", "--out", work / "run", *small)
    assert trained.returncode == 0, trained.stderr
    export_checkpoint(work / "run", work / "bundle", overrides=['export.targets=["x86", "arm64"]'])
    return work / "bundle"


def test_a_tiny_model_ships_as_fp32_and_says_why(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = export_checkpoint(toy, tmp_path / "bundle")
    assert capfd.readouterr() == ("", "")
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest == manifest
    source = checkpoints.load(toy).manifest
    assert manifest.parent_sha256 == source.model_sha256
    assert [step["model_sha256"] for step in manifest.lineage] == [source.model_sha256]
    assert (manifest.version, manifest.metrics, manifest.clients_seen) == (0, {"r2": 0.5}, ["c"])
    facts = manifest.targets["x86"]
    assert (facts["precision"], facts["file"]) == ("fp32", "model.x86.onnx")
    assert facts["note"].startswith("int8 ")
    card = (tmp_path / "bundle" / "card.md").read_text()
    assert facts["note"] in card
    assert source.model_sha256[:16] in card
    golden = read_golden(tmp_path / "bundle" / "golden.npz")
    assert set(golden.outputs) == {"fp32", "x86"}
    golden_check(bundle, "x86")


def test_sums_are_those_of_sha256sum(exported: Path) -> None:
    lines = (exported / SUMS_NAME).read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert {line.split("  ")[1] for line in lines} | {SUMS_NAME} == {p.name for p in exported.iterdir()}


def test_the_bundle_gives_what_torch_gives(exported: Path) -> None:
    app, config = small_config("toy_regression")
    examples = app.generate(config, 11).examples(config)
    expected = predict_torch(app.build_model(config), app, config, examples)
    got = predict(app, config, open_bundle(exported), examples)
    assert set(got) == set(expected)
    np.testing.assert_allclose(got["value"], expected["value"], rtol=1e-4, atol=1e-5)


def test_a_missed_parity_leaves_nothing(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(GoalMissed, match="parity"):
        export_checkpoint(toy, tmp_path / "bundle", overrides=["export.parity_tolerance=0.0"])
    assert list(tmp_path.iterdir()) == []


class Rounding(nn.Module):
    """A model whose float32 kernels are ``error`` off."""

    def __init__(self, model: nn.Module, error: float) -> None:
        super().__init__()
        self.model, self.error = model, error

    def forward(self, *inputs: Tensor) -> Tensor:
        made: Tensor = self.model(*inputs)
        return made + (self.error if made.dtype == torch.float32 else 0.0)


def test_torch_in_float64_decides_where_float32_torch_is_the_one_that_rounds() -> None:
    app, config = small_config("toy_regression")
    examples = app.generate(config, 11).examples(config)
    exact = predict_torch(app.build_model(config).double(), app, config, examples)
    scale = float(np.abs(exact["value"]).max())
    outputs = {"value": exact["value"].astype(np.float32)}
    report = against_torch(Rounding(app.build_model(config), 1e-3 * scale), app, config, examples, outputs)
    assert report.relative_max < 1e-6
    wrong = {"value": outputs["value"] + np.float32(1e-2 * scale)}
    report = against_torch(Rounding(app.build_model(config), 1e-3 * scale), app, config, examples, wrong)
    assert report.relative_max > 5e-3, "an export that is wrong stays wrong"


def test_samples_may_come_from_the_operator(toy: Path, tmp_path: Path) -> None:
    app = application("toy_regression")
    app.generate(app.configure(["data.clients=4"]), 9).write(tmp_path / "data")
    manifest = export_checkpoint(toy, tmp_path / "bundle", tmp_path / "data")
    assert manifest.unknown["export"]["samples"] == "data given by the operator"
    app.generate(app.configure(["data.clients=1", "data.examples_per_client=10"]), 9).write(tmp_path / "few")
    with pytest.raises(DataError, match="too few"):
        export_checkpoint(toy, tmp_path / "none", tmp_path / "few")
    assert not (tmp_path / "none").exists()


def test_wrong_input_is_refused_before_work(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match=r"(?s)unknown edge target 'gpu'.*arm64, x86"):
        export_checkpoint(toy, out, overrides=['export.targets=["gpu"]'])
    with pytest.raises(ConfigError, match="each once"):
        export_checkpoint(toy, out, overrides=['export.targets=["x86", "x86"]'])
    with pytest.raises(ConfigError, match=r"export\.opset"):
        export_checkpoint(toy, out, overrides=["export.opset=3"])
    with pytest.raises(InputError, match="not a checkpoint"):
        export_checkpoint(tmp_path / "absent", out)
    assert not out.exists()


def test_a_damaged_checkpoint_is_refused(toy: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "ckpt", "toy_regression")
    data = bytearray((tmp_path / "ckpt" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "ckpt" / "model.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="sha256"):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "bundle")


def test_int8_of_a_real_model_is_smaller_and_close(conflict: Path) -> None:
    manifest = open_bundle(conflict).manifest
    export = manifest.unknown["export"]
    for name, activation in (("x86", "uint8"), ("arm64", "int8")):
        facts = manifest.targets[name]
        if name == "x86" and "int8 does not pay" in facts["note"]:
            continue  # measured on this machine, whose processor may have no 8-bit products
        assert (facts["precision"], facts["activation_type"], facts["note"]) == ("int8", activation, "")
        assert facts["bytes"] < 0.75 * export["fp32_bytes"]
        assert facts["score_drift"] < 0.05
        operators = {n.op_type for n in onnx.load(str(conflict / facts["file"])).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= operators
        golden_check(open_bundle(conflict), name)
    assert export["parity"]["relative_max"] < 1e-4
    assert sum(p.stat().st_size for p in conflict.iterdir()) < 300_000


def test_missing_sensors_stay_finite_in_int8(conflict: Path) -> None:
    app = application("driver_conflict")
    bundle = open_bundle(conflict)
    config = app.configure_from(bundle.manifest.config, origin="bundle")
    raw = app.generate(config, 5).examples(config)
    window = raw.inputs["window"].copy()
    window[0] = np.nan
    window[1, :, ::2] = np.nan
    window[2] = np.inf
    window[3] = 1e30
    for target in bundle.manifest.targets:
        found = predict(app, config, bundle, type(raw)({"window": window}, raw.targets, raw.columns), target=target)
        assert sorted(found) == sorted(o.name for o in app.outputs(config))
        assert all(np.isfinite(values).all() for values in found.values())


def test_a_scores_gate_that_is_missed_falls_back_to_fp32(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "ckpt", "toy_regression", "model.hidden=64")
    manifest = export_checkpoint(source, tmp_path / "bundle", overrides=["export.int8_tolerance=0.0"])
    facts = manifest.targets["x86"]
    assert facts["precision"] == "fp32"
    assert "0 is allowed" in facts["note"]
    assert facts["bytes"] == manifest.unknown["export"]["fp32_bytes"]
    assert facts["note"] in (tmp_path / "bundle" / "card.md").read_text()


def test_weights_stay_in_float_only_where_no_smaller_model_holds_the_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_export.variants.GOOD_ENOUGH", 1e-9)  # every recipe is looked at
    monkeypatch.setattr("edge_export.gates.MAX_METRIC_LOSS", np.inf)  # of a model that was never trained
    source = make_checkpoint(tmp_path / "ckpt", "toy_regression", "model.hidden=512")
    wanted = ["export.int8_tolerance=1.0", 'export.targets=["arm64"]']  # not run here, so that no clock decides
    facts = export_checkpoint(source, tmp_path / "bundle", overrides=wanted).targets["arm64"]
    assert facts["precision"] == "int8", facts["note"]
    assert facts["score_drift"] > 0
    assert not facts["recipe"].startswith("first half")


def test_no_trace_of_the_exporting_machine_in_the_model(conflict: Path) -> None:
    for file in conflict.glob("*.onnx"):
        data = file.read_bytes()
        for trace in (b"site-packages", b".py:", b'.py"', b"File ", str(ROOT).encode()):
            assert trace not in data


INFER = """
import sys
from pathlib import Path
from fl_clients.edge.inference import InferenceEngine
from fl_core.learning.application import application
from fl_core.runtime.machine import resident_bytes
import paho.mqtt.client, ssl
app = application("driver_conflict")
columns = InferenceEngine(Path(sys.argv[1]), "driver_conflict").infer(app.read(Path(sys.argv[2])))
print(resident_bytes() >> 20, len(columns["score"]))
"""


def test_from_checkpoint_to_a_small_inferring_device(conflict: Path, tmp_path: Path) -> None:
    """Export, publish, update and infer; under 100 MB in the process that infers."""
    done = publish_bundle(conflict, tmp_path / "repo")
    result = update(
        tmp_path / "home", application="driver_conflict", repository=str(done.repository), root=done.root, target="x86"
    )
    assert (result.status, result.version) == ("installed", 1)
    bundle = current_bundle(tmp_path / "home")
    assert bundle is not None
    assert not (bundle.folder / "model.arm64.onnx").exists()
    app, config = small_config("driver_conflict", "data.clients=1")
    raw = app.generate(config, 3)
    raw.write(tmp_path / "data")
    ran = run_python(["-c", INFER, str(tmp_path / "home"), str(tmp_path / "data")])
    assert ran.returncode == 0, ran.stderr
    megabytes, count = map(int, ran.stdout.split())
    assert count == len(raw.examples(config))
    assert megabytes < 100


def test_the_commands(toy: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    code, out, _ = run("export", toy, "--out", tmp_path / "bundle", "--json")
    assert (code, json.loads(out)["targets"]["x86"]["precision"]) == (0, "fp32")
    code, out, _ = run("publish", exported, "--repo", tmp_path / "repo", "--json")
    assert (code, json.loads(out)["version"]) == (0, 1)
    for expected, arguments in (
        (2, ["export", toy, "--out", tmp_path / "bundle"]),
        (2, ["export", toy, "--out", tmp_path / "x", "--calibration", tmp_path / "absent"]),
        (2, ["export", tmp_path / "absent", "--out", tmp_path / "x"]),
        (1, ["export", toy, "--out", tmp_path / "x", "--set", "export.parity_tolerance=0"]),
        (2, ["publish", toy, "--repo", tmp_path / "repo"]),
        (2, ["publish", tmp_path / "bundle", "--repo", tmp_path / "repo", "--channel", "a/b"]),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (expected, ""), err
        assert "fieldfleet: " in err
        assert "Traceback" not in err
    assert not (tmp_path / "x").exists()
