"""A server that stands: runs side by side, stopped and resumed, through kill -9; its metrics; its end."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fl_core.contracts import checkpoint as checkpoints
from tests.helpers import fieldfleet
from tests.standing import Standing, standing, until

RUN = ("runs", "start", "toy_regression", "--min-devices", "2", "--set", "algorithm.min_clients=2")


def test_runs_side_by_side_and_after_each_other(tmp_path: Path) -> None:
    with standing(tmp_path) as server, server.devices("van-1", "van-2"):
        server.run(*RUN, "--rounds", "3", "--name", "a")
        server.run(*RUN, "--rounds", "3", "--name", "b", "--seed", "7")
        for name in "ab":
            facts = server.run("runs", "wait", name)
            assert (facts["status"], facts["rounds_done"]) == ("finished", 3)
        found = {name: checkpoints.load(server.home.path / "runs" / name / "final") for name in "ab"}
        assert found["a"].manifest.seed == 0
        assert found["b"].manifest.seed == 7
        assert found["a"].manifest.clients_seen == ["van-1", "van-2"]
        start = str(server.home.path / "runs" / "a" / "final")
        facts = server.run(*RUN, "--rounds", "1", "--name", "c", "--from", start, "--wait")
        assert facts["status"] == "finished"
        child = checkpoints.load(server.home.path / "runs" / "c" / "final").manifest
        assert child.parent_sha256 == found["a"].manifest.model_sha256
        shown = server.run("runs", "show", "a")
        assert [record["round"] for record in shown["history"]] == [1, 2, 3]
        assert [run["name"] for run in server.run("runs", "list")["runs"]] == ["a", "b", "c"]
        again = fieldfleet(*RUN, "--rounds", "3", "--name", "a", "--home", server.home.path)
        assert again.returncode == 2
        assert "already" in again.stderr
        assert server.metric('fieldfleet_rounds_total{run="a",result="applied"}') == 3
        assert server.metric('fieldfleet_replies_total{run="b",outcome="counted"}') == 6
        assert server.metric('fieldfleet_round_seconds_bucket{run="a",le="+Inf"}') == 3
        assert server.metric("fieldfleet_devices_online") == 2
        assert server.metric('fieldfleet_devices{status="active"}') == 2
        assert server.metric("fieldfleet_process_resident_memory_bytes") > 10e6
        assert server.metric('fieldfleet_store_bytes{store="state"}') > 0
        assert server.metric('fieldfleet_http_bytes_total{direction="received"}') > 1000
        assert server.get("/healthz") == (200, "ok\n")
        assert server.get("/readyz") == (200, "ok\n")
        assert server.get("/else")[0] == 404
        logged = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
        assert {entry["run"] for entry in logged if "run ended" in entry["message"]} == {"a", "b", "c"}
        assert server.end() == 0
        assert not server.home.control_socket.exists()


def test_a_device_is_revoked_in_mid_round_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    with standing(tmp_path) as server, server.devices("van-1", "van-2") as (one, two):
        one.switch("hold", True)
        options = ("--min-devices", "2", "--rounds", "2", "--set", "algorithm.min_clients=1")
        server.run("runs", "start", "toy_regression", "--name", "a", *options, "--set", "algorithm.deadline_s=30")
        until(lambda: one.seen() and two.seen())
        server.run("fleet", "revoke", "van-1")
        one.switch("hold", False)  # its reply comes after its revocation
        assert server.run("runs", "wait", "a")["status"] == "finished"
        history = server.run("runs", "show", "a")["history"]
        assert [sorted(record["clients"]) for record in history] == [["van-2"], ["van-2"]]
        assert "revoked" in one.wait_event("refused", 60)["reason"]
        assert server.end() == 0


def begun(server: Standing, rounds: int = 3) -> None:
    """A run whose second round waits for van-1."""
    server.run(*RUN, "--rounds", str(rounds), "--name", "a")


def test_killed_and_started_again_it_goes_on_with_its_runs(tmp_path: Path) -> None:
    with standing(tmp_path) as server, server.devices("van-1", "van-2") as (one, two):
        one.switch("hold", True)
        begun(server)
        until(lambda: one.seen() and two.seen())
        server.end(signal.SIGKILL)
        assert server.facts("a")["status"] == "running"
        assert fieldfleet("runs", "stop", "a", "--home", server.home.path).returncode == 4
        assert server.start()["resumed"] == ["a"]
        one.switch("hold", False)
        assert server.run("runs", "wait", "a")["status"] == "finished"
        assert two.seen() == [1, 1, 2, 2, 3, 3], "each round is trained once and evaluated once"
        assert server.end() == 0


@pytest.mark.slow
def test_stopped_and_resumed_and_the_end_of_the_server_in_mid_round(tmp_path: Path) -> None:
    with standing(tmp_path) as server, server.devices("van-1", "van-2") as (one, two):
        one.switch("hold", True)
        begun(server)
        until(lambda: one.seen() and two.seen())
        assert server.run("runs", "stop", "a")["status"] == "stopped"
        assert server.run("runs", "wait", "a", code=1)["status"] == "stopped"
        assert server.end() == 0
        assert server.start()["resumed"] == [], "an operator stopped it"
        assert server.run("runs", "resume", "a")["status"] == "running"
        assert server.end() == 0, "in mid-round: it drains"
        assert server.facts("a")["status"] == "running"
        assert server.start()["resumed"] == ["a"]
        one.switch("hold", False)
        assert server.run("runs", "wait", "a")["rounds_done"] == 3
        assert two.seen() == [1, 1, 2, 2, 3, 3], "each round is trained once and evaluated once"
        assert server.run("runs", "resume", "a", code=2) == {}


@pytest.mark.slow
def test_what_cannot_be_run_is_refused_by_the_command(tmp_path: Path) -> None:
    with standing(tmp_path) as server:
        for options, code in (
            (("runs", "start", "no_such_app", "--rounds", "1"), 2),
            (("runs", "start", "toy_regression", "--rounds", "0"), 2),
            (("runs", "start", "toy_regression", "--rounds", "1", "--set", "algorithm.name=none"), 2),
            (("runs", "start", "toy_regression", "--rounds", "1", "--from", tmp_path), 2),
            (("runs", "stop", "nothing"), 2),
        ):
            server.run(*options, code=code)
        assert server.run("runs", "list")["runs"] == []
        other = fieldfleet("server", "start", "--home", server.home.path)
        assert other.returncode == 3
        assert "another server" in other.stderr
        assert server.home.control_socket.stat().st_mode & 0o777 == 0o600
