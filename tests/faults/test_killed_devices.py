"""kill -9 of a device's agent at every point of a round: it comes back and the round ends as an undisturbed one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.fault_arena import NAMES, arena, workers
from tests.fault_table import Fault
from tests.federation import DeviceProcess
from tests.helpers import eventually
from tests.killed_device import POINTS

ROUNDS, AT = 3, 2
VICTIM = NAMES[0]
TRAINED_AGAIN = ("trained, not kept", "reply half kept")  # the work existed in the killed process only
IN_CI = ("instruction half received", "reply sent, not forgotten")


@pytest.mark.parametrize("point", [p if p in IN_CI else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_the_round_ends_as_if_nothing_had_happened(fault: Fault, tmp_path: Path, point: str) -> None:
    fault.about("kill -9 agent", point, "same node, same round, same weights; trained again only if nothing was kept")

    def prepare(device: DeviceProcess) -> None:
        if device.name == VICTIM:
            device.program = [sys.executable, "-m", "tests.killed_device", point, str(AT), str(tmp_path / "killed")]

    with arena(tmp_path, prepare=prepare) as field:
        nodes = dict(field.superlink.directory.names())
        field.begin(ROUNDS)
        victim = field.device(VICTIM)
        assert victim.process is not None
        eventually(lambda: victim.process and victim.process.poll() is not None, 60)
        assert victim.stop() == -signal.SIGKILL
        with fault.recovery():
            victim.start()
            field.wait_round(AT)
        field.finish()
        assert field.superlink.directory.names() == nodes
        field.check_model()
        field.check_trained({VICTIM: int(point in TRAINED_AGAIN)})
        eventually(lambda: not list((victim.folder / "fleet" / "outbox").glob("*.reply")), 30)
        field.check_acknowledged()


@pytest.mark.slow
def test_killed_while_it_waits(fault: Fault, tmp_path: Path) -> None:
    fault.about("kill -9 agent", "waiting for work", "offline at once; the next round waits for it, not for a deadline")
    with arena(tmp_path) as field:
        victim, other = field.device(VICTIM), field.device(NAMES[1])
        field.after[1] = lambda: other.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in victim.seen() and 2 in other.seen(), 60)
        eventually(lambda: [e for e, _ in victim.events].count("reply") == 2, 30)
        victim.stop(signal.SIGKILL)
        eventually(lambda: VICTIM not in field.superlink.grid().device_names().values(), 30)
        other.switch("hold", False)
        field.wait_round(2)
        with fault.recovery():
            victim.start()
            field.wait_round(3)
        field.finish()
        field.check_model()
        field.check_trained()


@pytest.mark.slow
def test_killed_while_its_worker_trains(fault: Fault, tmp_path: Path) -> None:
    fault.about(
        "kill -9 agent", "worker training", "the round goes on after the restart; its old worker ends by itself"
    )
    with arena(tmp_path) as field:
        victim = field.device(VICTIM)
        field.after[1] = lambda: victim.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in victim.seen(), 60)
        victim.stop(signal.SIGKILL)
        victim.switch("hold", False)
        with fault.recovery():
            victim.start()
            field.wait_round(2)
        field.finish()
        field.check_model()
        field.check_trained({VICTIM: 1})
        eventually(lambda: len(workers(victim)) <= 1, 30)
