"""``python -m benchmarks``: the exit codes of what it runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from fl_core.contracts.errors import DataError


def test_the_worst_exit_code_is_its_own_and_an_error_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three modules in the place of benchmarks: one that is done, one with bad data, one that misses a goal."""
    seen: list[list[str]] = []

    def missed(options: list[str]) -> int:
        seen.append(options)
        return 1

    def broken(options: list[str]) -> int:
        raise DataError("designs: holds no .npz file", remedy="make them first")

    found = {"tunnel": lambda options: None, "topology": broken, "scale": missed}
    monkeypatch.setattr(
        command.importlib, "import_module", lambda name: SimpleNamespace(main=found[name.split(".")[1]])
    )
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", *found])
    assert command.main() == 2
    assert seen == [["--quick"]]
    assert "topology: designs: holds no .npz file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks", "tunnel"])
    assert command.main() == 0
