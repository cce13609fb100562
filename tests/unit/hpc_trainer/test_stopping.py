"""A run that is killed or told to stop goes on in mid-epoch and ends with the undisturbed weights, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import ExitCode
from tests.helpers import eventually, fieldfleet

STEPS = 4  # between checkpoints
SETTINGS = (
    "model.hidden=8",
    "model.norm=batch",
    "pretrain.batch_size=3",
    "pretrain.epochs=6",
    "optimizer.momentum=0.9",
)


def command(out: Path, procs: int) -> list[str]:
    settings = [part for s in (*SETTINGS, f"pretrain.checkpoint_steps={STEPS}") for part in ("--set", s)]
    return ["pretrain", "toy_regression", "--data", "generated", "--out", str(out), "--procs", str(procs), *settings]


def disturbed(out: Path, procs: int, number: int, rank: int = -1) -> int:
    """Sends the signal to one of the training processes once a checkpoint in mid-epoch lies there; the command's exit code."""
    running = subprocess.Popen(
        [sys.executable, "-m", "fieldfleet", *command(out, procs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        eventually(lambda: list(out.glob("epoch-*-step-*")) or running.poll() is not None, 120)
        assert running.poll() is None, "the run ended before it was disturbed: make it longer"
        os.kill(victim(running.pid, rank), number)
        return running.wait(120)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)


def victim(pid: int, rank: int) -> int:
    """The command itself where it trains; else one of the processes that its launcher started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(children) == 1:
        return victim(int(children[0]), rank)
    return int(children[rank]) if children else pid


def weights(out: Path) -> str:
    return checkpoints.load(out / "final").manifest.model_sha256


@pytest.mark.timeout(300)
def test_a_stopped_run_checkpoints_first_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    calm, out = tmp_path / "calm", tmp_path / "out"
    assert fieldfleet(*command(calm, 1)).returncode == 0
    assert disturbed(out, 1, signal.SIGTERM) == ExitCode.INTERRUPTED
    assert list(out.glob("epoch-*"))
    assert not (out / "final").exists()
    assert fieldfleet(*command(out, 1)).returncode == 0
    assert weights(out) == weights(calm)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_no_bits(rank: int, tmp_path: Path) -> None:
    calm, out = tmp_path / "calm", tmp_path / "out"
    assert fieldfleet(*command(calm, 2), timeout=200).returncode == 0
    assert disturbed(out, 2, signal.SIGKILL, rank) == ExitCode.ENVIRONMENT
    assert fieldfleet(*command(out, 2), timeout=200).returncode == 0
    assert weights(out) == weights(calm)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
