"""Bundles, exit codes, names, logs, switches: what every room relies on."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts import errors, offswitches
from fl_core.contracts.bundle import is_bundle, open_bundle
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.cli import JsonLines
from fl_core.contracts.errors import ExitCode, FieldfleetError, InputError, IntegrityError
from fl_core.contracts.manifests import BundleManifest, CheckpointManifest, to_json
from fl_core.contracts.names import checked_name
from fl_core.contracts.progress import Progress
from fl_core.storage import atomic


def bundle(folder: Path, **change: Any) -> Path:
    folder.mkdir(exist_ok=True)
    contents = {"model.x86.onnx": b"onnx", "model.arm64.onnx": b"onnx-arm", "golden.npz": b"golden"}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    manifest = BundleManifest(
        application="toy_regression", config={}, version=1, parent_sha256="ab", inputs=[], outputs=[],
        targets={"x86": {"file": "model.x86.onnx"}, "arm64": {"file": "model.arm64.onnx"}},
        files={n: {"sha256": atomic.sha256_bytes(d), "bytes": len(d)} for n, d in contents.items()},
    )  # fmt: skip
    atomic.write_json(folder / "manifest.json", to_json(dataclasses.replace(manifest, **change)))
    return folder


def test_a_bundle_opens_and_names_its_models(tmp_path: Path) -> None:
    found = open_bundle(bundle(tmp_path / "b"))
    assert is_bundle(tmp_path / "b")
    assert found.model_file("x86") == tmp_path / "b" / "model.x86.onnx"
    with pytest.raises(InputError, match=r"no model for edge target 'tpu'\n.*arm64, x86"):
        found.model_file("tpu")
    (tmp_path / "b" / "model.arm64.onnx").unlink()
    assert open_bundle(tmp_path / "b", only=("model.x86.onnx", "golden.npz")).model_file("x86").is_file()
    with pytest.raises(IntegrityError, match=r"model\.arm64\.onnx: no such file"):
        open_bundle(tmp_path / "b")


def test_a_checkpoint_is_no_bundle(tmp_path: Path) -> None:
    Checkpoint(CheckpointManifest(application="a", config={}, stage="pretrain"), {}).save(tmp_path / "c")
    assert not is_bundle(tmp_path / "c")
    assert not is_bundle(tmp_path / "absent")


@pytest.mark.parametrize("data", [b"onnY", b"onn", b"onnx+"])
def test_a_changed_file_is_named(tmp_path: Path, data: bytes) -> None:
    (bundle(tmp_path / "b") / "model.x86.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.x86\.onnx: its size or sha256"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../manifest.json": {"sha256": "", "bytes": 0}}, "targets": {}},
        {"files": {"/etc/passwd": {"sha256": "", "bytes": 0}}, "targets": {}},
        {"files": {"model.x86.onnx": "ab"}, "targets": {}},
        {"files": {}},
        {"targets": {"x86": "model.x86.onnx"}},
        {"targets": {"x86": {}}},
        {"targets": {"x86": {"file": "../../evil.onnx"}}},
        {"targets": {"x86": {"file": "other.onnx"}}},
    ],
)
def test_hostile_bundle_manifests_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        open_bundle(bundle(tmp_path / "b", **change))


def test_every_error_has_its_documented_exit_code() -> None:
    found = {
        name: int(kind.exit_code)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, FieldfleetError) and kind is not FieldfleetError
    }
    assert found == {
        "GoalMissed": 1, "InputError": 2, "ConfigError": 2, "DataError": 2, "IntegrityError": 2,
        "EnvironmentFault": 3, "RefusedError": 4, "Interrupted": 130,
    }  # fmt: skip
    assert [int(c) for c in ExitCode] == [0, 1, 2, 3, 4, 130]
    for name, code in found.items():
        line = next(text for text in (errors.__doc__ or "").splitlines() if f" {name} " in text)
        assert f" {code} " in line
    assert str(InputError("what", remedy="how")) == "what\n  remedy: how"
    assert str(errors.unknown_name("thing", "x", [])) == "unknown thing 'x'\n  remedy: known: none"


@pytest.mark.parametrize("name", ["a", "van-1", "Van_1.b", "0", "x" * 64])
def test_usable_names(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".", "..", "a/b", "a b", "a\n", "ä", "a#", "+", "x" * 65, "$SYS"])
def test_unusable_names(name: str) -> None:
    with pytest.raises(InputError, match=r"device name .* is not usable\n.*1 to 64"):
        checked_name(name, "device name")


def test_off_switches_are_set_before_flwr_is_imported() -> None:
    offswitches.set_off_switches()
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert {k: os.environ[k] for k in offswitches.SWITCHES} == offswitches.SWITCHES


def test_logs_are_json_lines() -> None:
    record = logging.LogRecord("fl_server", logging.WARNING, "f", 1, "reply %s", ("refused",), None)
    record.facts = {"device": "van-1"}
    entry = json.loads(JsonLines().format(record))
    assert (entry["level"], entry["message"], entry["device"]) == ("warning", "reply refused", "van-1")
    try:
        raise ValueError("bad")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: bad" in json.loads(JsonLines().format(record))["error"]


def test_progress_goes_to_stderr_and_can_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for quiet, expected in ((False, ["train 2/2 loss 1"]), (True, [])):
        error = io.StringIO()
        monkeypatch.setattr(sys, "stderr", error)
        with Progress("train", 2, quiet=quiet) as bar:
            bar.update(2, "loss 1")
        assert error.getvalue().splitlines() == expected
