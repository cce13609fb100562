"""The compiled kernels' library: built once, done without where it cannot be built, also on a machine without a compiler."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import pytest

from simulations.engine.native import build
from tests.unit.simulations.engine.test_native import needs_compiler


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "off")
    assert build.library.__wrapped__() is None


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.library.__wrapped__() is None


def test_a_compiler_that_fails_costs_speed_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no headers here >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert "no headers here" in caplog.text


@needs_compiler
def test_a_damaged_file_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(build, "built", lambda compiler, cache: broken)
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert "not used" in caplog.text


@needs_compiler
def test_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert isinstance(build.library.__wrapped__(), ctypes.CDLL)
