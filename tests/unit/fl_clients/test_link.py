"""FleetLink against a real server in this process: waking, the worker's life, what it tells."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MessageType

from fl_clients.connection import ServerConnection
from fl_clients.training.breaker import LIMIT
from fl_clients.training.link import FleetLink
from fl_clients.training.worker_process import WorkerProcess
from fl_core.flower.messages import Reply
from fl_core.identity import keys
from fl_server.link_grid import LinkGrid
from fl_server.superlink import SuperLink
from tests.federation import ARRAYS, new_home, new_key, request, running
from tests.helpers import ROOT, eventually


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with running(new_home(tmp_path_factory.mktemp("server") / "home")) as found:
        yield found


class Link:
    """A FleetLink in a thread, with the trivial worker."""

    def __init__(self, superlink: SuperLink, folder: Path, name: str, **options: Any) -> None:
        (folder / "switches").mkdir()
        key = new_key(folder)
        superlink.registry.register(name, keys.public_pem(key))
        worker = [sys.executable, str(ROOT / "tests" / "echo_worker.py"), str(folder / "switches"), name]
        self.events: list[str] = []
        self.link = FleetLink(
            ServerConnection(superlink.url, superlink.home.ca_file, key),
            folder / "fleet",
            worker,
            on_event=lambda event, facts: self.events.append(event),
            **options,
        )


@contextmanager
def linked(superlink: SuperLink, folder: Path, name: str, **options: Any) -> Iterator[Link]:
    found, stop = Link(superlink, folder, name, **options), threading.Event()
    thread = threading.Thread(target=found.link.run, args=(stop,))
    thread.start()
    try:
        eventually(lambda: "joined" in found.events, 20)
        yield found
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def ask(grid: LinkGrid, name: str) -> str:
    node = next(node for node, found in grid.device_names().items() if found == name)
    (message_id,) = grid.push_messages([grid.create_message(request().to_record(), MessageType.TRAIN, node, "train-1")])
    return message_id


def check(grid: LinkGrid, message_id: str, timeout: float = 30) -> None:
    assert grid.wait_ready({message_id}, timeout) == {message_id}
    read = Reply.from_record(grid.pull_messages([message_id])[0].content, origin="device")
    np.testing.assert_array_equal(read.arrays["weight"], ARRAYS["weight"] + 1)
    grid.forget([message_id])


def test_with_a_bell_it_holds_no_long_poll(superlink: SuperLink, tmp_path: Path) -> None:
    wake = threading.Event()
    with linked(superlink, tmp_path, "belled", wake=wake) as device:
        grid = superlink.grid()
        superlink.bell.on_push(lambda nodes: wake.set())
        check(grid, ask(grid, "belled"))
        check(grid, ask(grid, "belled"))
        assert not superlink.bell._doors
        eventually(lambda: device.events == ["joined", "message", "reply", "message", "reply"])


def test_while_its_bell_is_broken_it_holds_a_long_poll(superlink: SuperLink, tmp_path: Path) -> None:
    with linked(superlink, tmp_path, "unbelled", wake=threading.Event(), wake_ready=lambda: False):
        grid = superlink.grid()
        eventually(lambda: superlink.bell._doors)
        check(grid, ask(grid, "unbelled"))


def test_a_lost_ring_costs_one_safety_poll(superlink: SuperLink, tmp_path: Path) -> None:
    with linked(superlink, tmp_path, "deaf", wake=threading.Event(), safety_seconds=0.3):
        grid = superlink.grid()
        check(grid, ask(grid, "deaf"))


def test_the_worker_starts_with_the_first_message_stays_warm_and_ends_when_idle(
    superlink: SuperLink, tmp_path: Path
) -> None:
    with linked(superlink, tmp_path, "frugal", poll_seconds=0.2, idle_seconds=1.0) as device:
        grid, worker = superlink.grid(), device.link.worker
        assert worker.pid is None
        check(grid, ask(grid, "frugal"))
        first = worker.pid
        assert first is not None
        check(grid, ask(grid, "frugal"))
        assert worker.pid == first
        eventually(lambda: worker.pid is None, 10)
        check(grid, ask(grid, "frugal"))
        assert worker.pid not in (None, first)


def test_a_worker_that_keeps_crashing_is_not_started_for_ever(superlink: SuperLink, tmp_path: Path) -> None:
    with linked(superlink, tmp_path, "crashing", poll_seconds=1.0) as device:
        grid, switches = superlink.grid(), tmp_path / "switches"
        (switches / "crash").touch()
        for _ in range(LIMIT):
            assert "exit code 7" in failure(grid, ask(grid, "crashing"))
        assert "training is disabled" in failure(grid, ask(grid, "crashing"))
        assert len((switches / "seen").read_text().split()) == LIMIT, "the worker was not asked again"
        (switches / "crash").unlink()
        assert "exit code 7" in failure(grid, ask(grid, "crashing")), "it says why"
        device.link.breaker.reset()
        check(grid, ask(grid, "crashing"))
        assert not device.link.breaker.circuit.crashes


def failure(grid: LinkGrid, message_id: str) -> str:
    assert grid.wait_ready({message_id}, 60) == {message_id}
    reply = grid.pull_messages([message_id])[0]
    grid.forget([message_id])
    return str(reply.error.reason)


def test_a_worker_that_ignores_the_end_of_input_is_killed() -> None:
    worker = WorkerProcess([sys.executable, "-c", "import signal; signal.pause()"])
    process = worker._running()
    worker.close()
    assert process.poll() is not None
    assert worker.pid is None
