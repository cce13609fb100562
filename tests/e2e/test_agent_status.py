"""``agent status`` while the agent runs, after it ended, after it was killed, and in a home with a long name."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_clients.edge.home import AgentHome
from fl_clients.edge.operator import OperatorSocket, StatusFile, ask
from fl_clients.training.breaker import LIMIT, Breaker
from fl_core.contracts.installed import package_version
from tests.bundles import TOY
from tests.field import NAME, Field
from tests.helpers import eventually, fieldfleet


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    found = Field(tmp_path)
    yield found
    found.stop()


def status(field: Field) -> dict[str, Any]:
    done = fieldfleet("agent", "status", field.agent, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_matters_whether_it_runs_or_not(field: Field) -> None:
    assert (status(field)["running"], status(field)["agent"]) == (False, None)
    field.register()
    field.publish(0)
    for _ in range(LIMIT):
        Breaker(field.agent / "fleet" / "breaker.json", package_version("fieldfleet") or "").crashed(5, "signal 9")
    assert "signal 9" in status(field)["training_disabled"]
    with field.running() as process:
        found = eventually(lambda: _all_is_well(status(field)), 90)
        assert (found["name"], found["fleet"], found["models"][TOY]["version"]) == (NAME, "test", 1)
        assert found["agent"]["pid"] == process.pid
        assert found["agent"]["outbox"]["dropped"] == 0
        words = fieldfleet("agent", "status", field.agent).stdout
        for word in (f"process {process.pid}", NAME, "connected to", f"{TOY}: version 1", "ok since", "signal 9"):
            assert word in words
        assert fieldfleet("agent", "enable-training", field.agent).returncode == 0
        assert status(field)["training_disabled"] == ""
        assert (field.agent / "agent.sock").stat().st_mode & 0o077 == 0
        inference = found["agent"]["inference_process"]["pid"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: inference is None or not Path(f"/proc/{inference}").exists(), 60)
    dead = status(field)
    assert dead["running"] is False
    assert dead["agent"]["contact"]["state"] in ("starting", "ok"), "what it said last"
    with field.running():
        assert status(field)["running"] is True, "the dead one's socket is in nobody's way"
    assert not (field.agent / "agent.sock").exists()
    assert "does not run; last heard 2" in fieldfleet("agent", "status", field.agent).stdout


def _all_is_well(found: dict[str, Any]) -> dict[str, Any] | None:
    agent = found["agent"]
    good = found["running"] and agent["contact"]["state"] == "ok" and agent["broker"]["connected"]
    return found if good and found["models"][TOY] and agent["training"]["state"] == "joined" else None


def test_a_home_with_a_long_name_has_its_socket_too(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    home = AgentHome(folder)
    assert ask(home, "status") is None
    served = OperatorSocket(home, lambda request: {"did": request["do"]})
    served.start()
    try:
        assert ask(home, "status") == {"did": "status"}
    finally:
        served.stop()
    assert ask(home, "status") is None


@pytest.mark.parametrize("damage", ["", "[]", "{"])
def test_a_damaged_status_file_is_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / "status.json").write_text(damage)
    assert StatusFile(AgentHome(tmp_path)).read() is None
