"""``python -m benchmarks``: the exit codes of what it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks._goals import verdict
from benchmarks.quality import call
from fl_core.contracts.errors import DataError, InputError


def test_the_worst_exit_code_is_its_own_and_an_error_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modules in the place of benchmarks, since a goal is missed only after hours: one is done, one has bad data, one misses a goal."""
    seen: list[list[str]] = []

    def missed(options: list[str]) -> int:
        seen.append(options)
        return 1

    def broken(options: list[str]) -> int:
        raise DataError("designs: holds no .npz file", remedy="make them first")

    found = {"tunnel": lambda options: None, "topology": broken, "scale": missed}
    with monkeypatch.context() as patch:
        patch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(main=found[name.split(".")[1]]))
        patch.setattr(sys, "argv", ["benchmarks", "--quick", *found])
        assert command.main() == 2
        assert seen == [["--quick"]]
        assert "topology: designs: holds no .npz file" in capsys.readouterr().err
        patch.setattr(sys, "argv", ["benchmarks", "tunnel"])
        assert command.main() == 0


def test_bad_input_of_a_benchmark_is_a_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "topology", "--as-it-is", "--data", str(tmp_path / "none")])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "none") in said
    assert "remedy: each solved problem is one NAME.npz" in said


def test_a_command_that_fails_inside_a_benchmark_is_named() -> None:
    with pytest.raises(InputError, match="fieldfleet evaluate ended with 2"):
        call("evaluate", "no-such-folder")


def test_a_missed_goal_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict({"a": True}) == 0
    assert verdict({"a": True, "b": False}) == 1
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [["met", "a"], ["MISSED", "b"]]
