"""The owner's policy over a real link and a real worker process: waiting, refusing, pausing, limits."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import MessageType

from fl_clients.edge.policy import Decision, PolicySettings
from fl_clients.training.supervision import MARGIN_S
from fl_clients.training.worker_process import WorkerLimits, WorkerProcess
from fl_server.superlink import SuperLink
from tests.federation import new_home, request, running
from tests.helpers import ROOT, eventually
from tests.unit.fl_clients.test_link import ask, check, failure, linked


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with running(new_home(tmp_path_factory.mktemp("server") / "home")) as found:
        yield found


class Switch:
    """A policy that says what the test wants."""

    def __init__(self, **settings: float) -> None:
        self.policy = PolicySettings(train_require_charging=True, **settings)  # type: ignore[arg-type]
        self.decision = Decision()
        self.seconds = 0.0

    def decide(self) -> Decision:
        return self.decision

    def trained(self, seconds: float) -> None:
        self.seconds += seconds

    def counted(self, application: str, number: int) -> None:
        raise AssertionError("this worker counts nothing")

    def forbid(self, reason: str = "not charging", lasts_s: float = 0.0) -> None:
        self.decision = Decision(reason, lasts_s)

    def allow(self) -> None:
        self.decision = Decision()


def state_of(pid: int) -> str:
    """T: stopped, by /proc."""
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]


def test_a_message_waits_until_training_is_allowed(superlink: SuperLink, tmp_path: Path) -> None:
    permit = Switch()
    permit.forbid()
    with linked(superlink, tmp_path, "patient", permit=permit) as device:
        grid = superlink.grid()
        asked = ask(grid, "patient")
        eventually(lambda: "waiting" in device.events, 60)
        assert device.link.worker.pid is None
        permit.allow()
        check(grid, asked, 60)
        assert device.events.count("resumed") == 1


@pytest.mark.parametrize(("wait_s", "lasts_s"), [(0.2, 0.0), (600.0, 3_600.0)])
def test_what_cannot_be_trained_in_time_is_refused_with_the_reason(
    superlink: SuperLink, tmp_path: Path, wait_s: float, lasts_s: float
) -> None:
    permit, name = Switch(wait_s=wait_s), f"quiet-{wait_s:.0f}"
    permit.forbid("quiet hours until 06:00", lasts_s)
    with linked(superlink, tmp_path, name, permit=permit) as device:
        grid = superlink.grid()
        assert "quiet hours until 06:00" in failure(grid, ask(grid, name))
        assert "declined" in device.events
        assert device.link.worker.pid is None
        assert not device.link.breaker.circuit.crashes
        permit.allow()
        check(grid, ask(grid, name), 60)


def test_it_does_not_wait_longer_than_the_server(superlink: SuperLink, tmp_path: Path) -> None:
    permit = Switch(wait_s=3_600.0)
    permit.forbid()
    with linked(superlink, tmp_path, "hurried", permit=permit):
        grid = superlink.grid()
        (node,) = (node for node, name in grid.device_names().items() if name == "hurried")
        message = grid.create_message(request().to_record(), MessageType.TRAIN, node, "train-1", ttl=MARGIN_S + 1.0)
        (asked,) = grid.push_messages([message])
        assert "not charging" in failure(grid, asked)


def test_training_is_paused_and_goes_on(superlink: SuperLink, tmp_path: Path) -> None:
    permit = Switch()
    with linked(superlink, tmp_path, "paused", permit=permit) as device:
        grid, switches = superlink.grid(), tmp_path / "switches"
        (switches / "hold").touch()
        asked = ask(grid, "paused")
        eventually((switches / "beats").exists, 60)
        permit.forbid()
        eventually(lambda: "paused" in device.events, 60)
        pid = device.link.worker.pid
        assert pid is not None
        eventually(lambda: state_of(pid) == "T", 60)
        counted, beats = permit.seconds, (switches / "beats").stat().st_size
        assert not grid.wait_ready({asked}, 2.5)
        assert (switches / "beats").stat().st_size == beats, "it does nothing while it is paused"
        assert permit.seconds == counted, "a pause is no training"
        permit.allow()
        eventually(lambda: (switches / "beats").stat().st_size > beats, 60)
        (switches / "hold").unlink()
        check(grid, asked, 60)
        assert device.link.worker.pid == pid
        assert device.events.count("resumed") == 1
        assert permit.seconds > 0


def test_a_pause_that_lasts_too_long_is_given_up(superlink: SuperLink, tmp_path: Path) -> None:
    permit = Switch(pause_s=1.5)
    with linked(superlink, tmp_path, "given-up", permit=permit) as device:
        grid, switches = superlink.grid(), tmp_path / "switches"
        (switches / "hold").touch()
        asked = ask(grid, "given-up")
        eventually((switches / "beats").exists, 60)
        permit.forbid("63 C, 60 C allowed")
        assert "63 C" in failure(grid, asked)
        assert device.link.worker.pid is None
        assert not device.link.breaker.circuit.crashes, "no fault of the worker's"
        permit.allow()
        (switches / "hold").unlink()
        check(grid, ask(grid, "given-up"), 60)


def test_the_end_of_the_agent_ends_a_paused_worker(superlink: SuperLink, tmp_path: Path) -> None:
    permit = Switch()
    with linked(superlink, tmp_path, "ending", permit=permit) as device:
        grid, switches = superlink.grid(), tmp_path / "switches"
        (switches / "hold").touch()
        ask(grid, "ending")
        eventually((switches / "beats").exists, 60)
        permit.forbid()
        eventually(lambda: "paused" in device.events, 60)
        pid = device.link.worker.pid
        assert pid is not None
    assert not (Path("/proc") / str(pid)).exists()


def test_limits_of_the_worker(superlink: SuperLink, tmp_path: Path) -> None:
    permit = Switch(worker_memory_mb=1_024, worker_nice=7)
    with linked(superlink, tmp_path, "limited", permit=permit) as device:
        grid, switches = superlink.grid(), tmp_path / "switches"
        check(grid, ask(grid, "limited"), 60)
        pid = device.link.worker.pid
        assert pid is not None
        assert resource.prlimit(pid, resource.RLIMIT_DATA) == (1 << 30, 1 << 30)
        assert os.getpriority(os.PRIO_PROCESS, pid) == 7
        assert (Path("/proc") / str(pid) / "oom_score_adj").read_text().strip() == "1000"
        (switches / "hog").touch()
        assert "MemoryError" in failure(grid, ask(grid, "limited"))
        (switches / "hog").unlink()
        check(grid, ask(grid, "limited"), 60)
        assert device.link.worker.pid == pid, "it could say so, and lives on"


AGENT = """
import sys
from fl_clients.training.worker_process import WorkerProcess
worker = WorkerProcess(sys.argv[1:])
worker._running()
worker._process.stdout.read(1)
worker.pause()
print(worker.pid, flush=True)
sys.stdin.read()
"""
WORKER = """
import sys, threading
from fl_clients.training.worker import end_with_parent
end_with_parent()
sys.stdout.write("x"); sys.stdout.flush()
threading.Event().wait()
"""


def test_a_killed_agent_leaves_no_paused_worker_behind(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, sys.executable, str(tmp_path / "worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        eventually(lambda: state_of(pid) == "T", 60)
    finally:
        agent.kill()
        agent.communicate()

    def gone() -> bool:
        try:
            return state_of(pid) in ("Z", "X")
        except OSError:
            return True

    eventually(gone, 60)


def test_a_worker_ended_by_the_kernel_is_told_so(tmp_path: Path) -> None:
    worker = WorkerProcess([sys.executable, "-c", "import sys; sys.stdin.read()"], limits=WorkerLimits(nice=1))
    process = worker._running()
    process.kill()
    assert "out of memory" in worker._ending(process)
    worker.kill()
