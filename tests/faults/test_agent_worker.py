"""Crashes of the real training worker: the agent lives on, the server hears of it at once, and the next round works."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MessageType

from fl_core.contracts.config import to_table
from fl_core.flower.messages import Reply, Request
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from fl_server.link_grid import LinkGrid
from tests.bundles import TOY
from tests.field import NAME, Field
from tests.helpers import eventually


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    found = Field(tmp_path)
    found.register()
    found.superlink.bell.on_push(lambda nodes: found.service.wake([NAME]))
    yield found
    found.stop()


def ask(grid: LinkGrid, round: int) -> str:
    app = application(TOY)
    config = app.configure()
    request = Request(
        application=TOY,
        config=to_table(config),
        round=round,
        num_rounds=9,
        seed=0,
        arrays=get_arrays(app.build_model(config)),
    )
    (node,) = grid.device_names()
    (message_id,) = grid.push_messages(
        [grid.create_message(request.to_record(), MessageType.TRAIN, node, f"train-{round}")]
    )
    return message_id


def reply(grid: LinkGrid, message_id: str) -> Any:
    assert grid.wait_ready({message_id}, 120) == {message_id}
    return grid.pull_messages([message_id])[0]


def trained(grid: LinkGrid, round: int) -> bool:
    return Reply.from_record(reply(grid, ask(grid, round)).content, origin=NAME).num_examples > 0


def worker_of(agent: int) -> int | None:
    """The process id of an agent's training worker, from /proc."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != agent:
                continue
            if b"fl_clients.training.worker" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return None


def test_a_killed_worker_is_reported_and_the_next_round_works(field: Field) -> None:
    with field.running("--no-infer") as process:
        grid = field.superlink.grid()
        grid.wait_devices(1, 60)
        asked = ask(grid, 1)
        os.kill(eventually(lambda: worker_of(process.pid), 60), signal.SIGKILL)
        assert "signal 9" in reply(grid, asked).error.reason
        assert eventually(lambda: field.device()["state"]["training"]["crashes"] == 1, 60)
        (report,) = eventually(lambda: field.bridge.table.reports(NAME, "worker-failed"), 60)
        assert "signal 9" in str(report)
        assert trained(grid, 2)
        assert process.poll() is None
        done = field.ask("enable-training")
        assert (done["ok"], done["training"]["crashes"], done["training"]["disabled"]) == (True, 0, "")


@pytest.mark.slow
def test_a_worker_without_memory_is_an_error_reply(field: Field) -> None:
    with field.running("--no-infer") as process:
        grid = field.superlink.grid()
        grid.wait_devices(1, 60)
        assert trained(grid, 1)
        worker = eventually(lambda: worker_of(process.pid), 60)
        before = resource.prlimit(worker, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        first = reply(grid, ask(grid, 2))
        if first.has_content():  # it had enough in its own pools for that: ask for another model than the one in memory
            first = reply(grid, _larger(grid, 3))
        assert first.has_error()
        assert process.poll() is None
        if worker_of(process.pid) == worker:
            resource.prlimit(worker, resource.RLIMIT_AS, before)
        assert trained(grid, 4)


def _larger(grid: LinkGrid, round: int) -> str:
    app = application(TOY)
    config = app.configure(["model.hidden=4096"])
    arrays = get_arrays(app.build_model(config))
    request = Request(application=TOY, config=to_table(config), round=round, num_rounds=9, seed=0, arrays=arrays)
    (node,) = grid.device_names()
    (found,) = grid.push_messages([grid.create_message(request.to_record(), MessageType.TRAIN, node, f"train-{round}")])
    return found
