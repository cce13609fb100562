"""kill -9 of a training worker in each phase: the agent lives, the server hears of it at once, the next round works."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault_arena import NAMES, Arena, arena, workers
from tests.fault_table import Fault
from tests.federation import DeviceProcess
from tests.helpers import eventually

ROUNDS = 4
VICTIM = NAMES[0]


def training(field: Arena, victim: DeviceProcess) -> None:
    eventually(lambda: 2 in victim.seen(), 60)
    os.kill(workers(victim)[0], signal.SIGKILL)
    victim.switch("hold", False)


def starting(field: Arena, victim: DeviceProcess) -> None:
    """It has been started for round 2 and still loads its modules."""
    eventually(lambda: workers(victim), 60)
    os.kill(workers(victim)[0], signal.SIGKILL)
    victim.switch("hold", False)


def answering(field: Arena, victim: DeviceProcess) -> None:
    eventually(lambda: any(event == "worker_failed" for event, _ in victim.events), 60)
    victim.switch("torn", False)


def before_training(field: Arena, victim: DeviceProcess) -> None:
    victim.switch("hold", True)


def before_starting(field: Arena, victim: DeviceProcess) -> None:
    victim.switch("hold", True)
    (idle,) = workers(victim)
    os.kill(idle, signal.SIGKILL)
    eventually(lambda: idle not in workers(victim))


def before_answering(field: Arena, victim: DeviceProcess) -> None:
    victim.switch("torn", True)


Step = Callable[[Arena, DeviceProcess], None]
PHASES: dict[str, tuple[Step, Step]] = {
    "training": (before_training, training),
    "starting": (before_starting, starting),
    "answer half written": (before_answering, answering),
}


@pytest.mark.parametrize("phase", [p if p == "training" else pytest.param(p, marks=pytest.mark.slow) for p in PHASES])
def test_the_next_round_works(fault: Fault, tmp_path: Path, phase: str) -> None:
    fault.about("kill -9 worker", phase, "agent lives; error reply ends the round at once; next round counts it again")
    before, kill = PHASES[phase]

    def prepare(device: DeviceProcess) -> None:
        device.worker[1] = str(Path(__file__).parents[1] / "dying_worker.py")
        device.environment = {"PYTHONPATH": str(Path(__file__).parents[2])}

    with arena(tmp_path, prepare=prepare) as field:
        victim = field.device(VICTIM)
        pid = victim.process and victim.process.pid
        field.after[1] = lambda: before(field, victim)
        field.begin(ROUNDS, "algorithm.min_clients=1")
        field.wait_round(1)
        kill(field, victim)
        with fault.recovery():
            record = field.wait_round(2)
            field.wait_round(3)
        field.finish()
        assert "signal 9" in record.refused[VICTIM]
        assert record.seconds < 60, "an error reply, not the deadline"
        assert victim.process is not None
        assert victim.process.pid == pid
        assert victim.process.poll() is None
        field.check_model([NAMES, NAMES[1:], NAMES, NAMES])
        eventually(lambda: [e for e, _ in victim.events].count("reply") == ROUNDS, 30)


@pytest.mark.slow
def test_killed_while_it_is_idle(fault: Fault, tmp_path: Path) -> None:
    fault.about("kill -9 worker", "idle", "a new one is started for the next instruction; nothing is refused")
    with arena(tmp_path) as field:
        victim, other = field.device(VICTIM), field.device(NAMES[1])
        field.after[1] = lambda: other.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in other.seen() and [e for e, _ in victim.events].count("reply") == 2, 60)
        os.kill(workers(victim)[0], signal.SIGKILL)
        other.switch("hold", False)
        field.wait_round(2)
        with fault.recovery():
            field.wait_round(3)
        field.finish()
        field.check_model()
        field.check_trained()
        assert not any(event == "worker_failed" for event, _ in victim.events)
