"""kill -9 of the command and its workers in mid-run: the same command goes on, and ends in the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fieldfleet.__main__ import main as command
from fl_server.history import read_history
from tests.helpers import ROOT, eventually


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential", "stacked"])
@pytest.mark.parametrize("victim", ["command", "worker"])
def test_a_killed_simulation_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], victim: str, engine: str
) -> None:
    words = ["simulate", "toy_regression", "--rounds", "200", "--workers", "2", "--engine", engine, "--json"]
    words += ["--set", "data.clients=10", "--set", "algorithm.name=scaffold"]  # with states of clients
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("wb") as stderr:
        running = subprocess.Popen(
            [sys.executable, "-m", "fieldfleet", *words, "--out", str(run)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        try:
            eventually(lambda: len(read_history(run)) > 5, 120)
            workers = psutil.Process(running.pid).children(recursive=True)
            assert workers
            os.kill(running.pid if victim == "command" else workers[0].pid, signal.SIGKILL)
            code = running.wait(timeout=240)
        finally:
            running.kill()
            running.wait()
    if victim == "command":
        assert code == -signal.SIGKILL
        eventually(lambda: not any(w.is_running() for w in workers), 20)
        assert len(read_history(run)) < 200
    else:
        assert code == 0, log.read_text()
    found = []
    for out in (run, tmp_path / "calm"):
        assert command([*words, "--out", str(out)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["model_sha256"] == found[1]["model_sha256"]
    assert [sorted(r["clients"]) for r in found[0]["history"]] == [sorted(r["clients"]) for r in found[1]["history"]]
