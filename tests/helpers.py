"""Helpers for tests: waiting on conditions, small configurations, the command as a subprocess."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_core.contracts.errors import FieldfleetError
from fl_core.contracts.installed import known_applications
from fl_core.contracts.sections import NORMS as NORMS
from fl_core.learning.application import Application, application
from fl_core.learning.examples import Examples

ROOT = Path(__file__).resolve().parent.parent
APPLICATIONS = known_applications()


def eventually(condition: Callable[[], Any], timeout: float = 10.0, *, interval: float = 0.01) -> Any:
    """Poll until ``condition()`` is truthy and return it; AssertionError after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout} s: {condition}"
        time.sleep(interval)
    return found


def refusal(kind: type[FieldfleetError], call: Callable[[], Any]) -> str | None:
    """The message with which ``call`` raised ``kind``; None where it went well. Any other error passes through."""
    try:
        call()
    except kind as error:
        return str(error)
    return None


def small_overrides(app: Application) -> list[str]:
    """Overrides that make any application's generated data small: few clients, little of each."""
    data = app.configure().data
    chosen = []
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if type(value) is int and field.name == "clients":
            chosen.append("data.clients=4")
        elif type(value) is int and field.name == "image_size":
            chosen.append(f"data.image_size={min(value, 48)}")
        elif type(value) is int and field.name == "size":
            chosen.append(f"data.size={min(value, 8)}")
        elif type(value) is int and field.name == "iterations":
            chosen.append(f"data.iterations={min(value, 2)}")
        elif type(value) is int and field.name in ("crop", "stride", "samples"):
            chosen.append(f"data.{field.name}={min(value, 16)}")
        elif type(value) is int and field.name in ("inlines", "crosslines"):
            chosen.append(f"data.{field.name}={min(value, 24)}")
        elif type(value) is int and field.name == "volumes_per_client":
            chosen.append("data.volumes_per_client=2")
        elif type(value) is int and field.name.endswith("_per_client"):
            chosen.append(f"data.{field.name}={min(value, 6)}")
    return chosen


def small_config(name: str, *overrides: str) -> tuple[Application, Any]:
    """(application, configuration with small generated data and the overrides)."""
    app = application(name)
    return app, app.configure([*small_overrides(app), *overrides])


def same_examples(found: Examples, expected: Examples, *, in_order: bool = True) -> None:
    """Equal inputs, targets and columns; with ``in_order=False`` after sorting both by example id."""
    if not in_order:
        found, expected = (e.take(np.argsort(e.columns["example_id"])) for e in (found, expected))
    assert set(found.inputs) == set(expected.inputs)
    assert set(found.columns) == set(expected.columns)
    for key, value in expected.inputs.items():
        np.testing.assert_array_equal(found.inputs[key], value, err_msg=key)
    np.testing.assert_array_equal(found.targets, expected.targets)
    for key, value in expected.columns.items():
        np.testing.assert_array_equal(found.columns[key], value, err_msg=key)


def run_python(
    arguments: list[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """This interpreter in a subprocess, without data folders from the caller's environment."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("FIELDFLEET_DATA", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**inherited, **(environment or {})},
        cwd=cwd,
        timeout=timeout,
        check=False,
    )


def fieldfleet(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """``fieldfleet ARGUMENTS`` as its users run it."""
    return run_python(["-m", "fieldfleet", *map(str, arguments)], environment=environment, cwd=cwd, timeout=timeout)
