"""The agent's decisions and its home, without a server."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.connection import Unreachable, Welcome
from fl_clients.edge import welcome as contact
from fl_clients.edge.duties import JOBS, JobDesk, Schedule
from fl_clients.edge.home import AgentHome
from fl_clients.edge.settings import settings_text
from fl_clients.edge.summary import SMALLEST_COUNT, summarize
from fl_core.contracts.errors import ConfigError, EnvironmentFault, InputError, RefusedError
from fl_core.identity import ca
from fl_core.link.envelope import Envelope
from tests.helpers import ROOT, fieldfleet

names = st.sampled_from(["a", "b", "c"])
events = st.lists(
    st.tuples(st.sampled_from(["command", "done", "crash"]), names, st.sampled_from([*JOBS, "odd", "wake"]))
)


@given(events)
def test_a_job_is_run_once_unless_a_crash_cut_it_off(steps: list[tuple[str, str, str]]) -> None:
    finished: set[str] = set()
    running: set[str] = set()
    desk = JobDesk(finished.__contains__)
    for step, job, kind in steps:
        if step == "crash":
            desk, running = JobDesk(finished.__contains__), set()
        elif step == "done" and job in running:
            finished.add(job)
            running.discard(job)
            desk.done(job)
        elif step == "command":
            decision = desk.decide(Envelope(type=kind, id=job))
            if kind == "wake":
                assert decision == "ring"
            elif job in finished:
                assert decision == "repeat"
            elif job in running:
                assert decision == "ignore"
            else:
                assert decision == ("run" if kind in JOBS else "refuse")
                if decision == "run":
                    running.add(job)


def test_duties_come_due_one_interval_after_they_were_done() -> None:
    schedule = Schedule({"update": 10.0, "infer": 0.0, "telemetry": 3.0})
    schedule.start(100.0)
    assert schedule.seconds_left(100.0, at_most=60.0) == 3.0
    assert schedule.take_due(102.9) == []
    assert schedule.take_due(103.0) == ["telemetry"]
    assert schedule.take_due(150.0) == ["update", "telemetry"], "late, but once"
    assert schedule.seconds_left(150.0, at_most=1.0) == 1.0
    assert schedule.seconds_left(200.0, at_most=60.0) == 0.0
    assert math.isinf(schedule.due_at["infer"])


def test_a_summary_says_how_many_and_how_high_but_no_value() -> None:
    scores = np.append(np.linspace(0, 1, 101), np.nan)
    found = summarize({"score": scores, "example_id": np.arange(102).astype(str)})
    assert set(found) == {"score"}
    assert found["score"]["count"] == 101
    assert found["score"]["not_finite"] == 1
    assert found["score"]["mean"] == pytest.approx(0.5)
    assert found["score"]["quantiles"]["0.95"] == pytest.approx(0.95)
    few = summarize({"score": scores[: SMALLEST_COUNT - 1]})
    assert few == {"score": {"count": SMALLEST_COUNT - 1, "not_finite": 0}}
    labels = summarize({"prediction": np.array(["rust", "rust", "healthy"])})
    assert labels == {"prediction": {"count": 3, "values": {"healthy": 1, "rust": 2}}}
    json.dumps([found, few, labels], allow_nan=False)


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    found = AgentHome(tmp_path)
    text = settings_text(url="https://localhost:1", name="v", applications=["toy_regression"])
    found.settings_file.write_text(text, encoding="utf-8")
    return found


def test_the_template_is_what_the_settings_are_by_default(home: AgentHome) -> None:
    settings = home.settings()
    assert settings.device.names == ("toy_regression",)
    assert settings.mqtt.protocol == "auto"
    assert home.data_folders(settings) == {"toy_regression": home.folder / "data"}
    with pytest.raises(InputError, match="--data"):
        home.data_folders(settings, [str(home.folder / "nowhere")])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('protocol = "auto"', 'protocol = "4"', ["mqtt.protocol", "auto"]),
        ("keepalive_s = 120", "keepalive_s = 1", ["mqtt.keepalive_s", "5"]),
        ("train = true", "train = 1", ["roles.train"]),
        ("[roles]", "[rolls]", ["rolls", "roles"]),
        ("https://", "http://", ["server.url", "https"]),
        ('channel = "stable"', 'channel = "a/b"', ["device.channel"]),
        ("[server]", "[server", ["not valid TOML"]),
        ("[server]", "[mqtt2]", ["server"]),
    ],
)
def test_a_wrong_setting_is_refused_with_the_file_and_the_key(
    home: AgentHome, old: str, new: str, words: list[str]
) -> None:
    text = home.settings_file.read_text(encoding="utf-8")
    assert old in text
    home.settings_file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        home.settings()
    for word in [str(home.settings_file), *words]:
        assert word in str(caught.value)


def test_the_boot_counter_grows_whatever_happened_to_its_file(home: AgentHome) -> None:
    first = home.next_boot()
    assert home.next_boot() == first + 1
    for damage in ("", "x", "-1", "true", "1.5", "9" * 5000):
        (home.folder / "boot").write_text(damage)
        assert home.next_boot() > first


LOCKER = """
import sys, pathlib
from fl_clients.edge.home import AgentHome
with AgentHome(pathlib.Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_agent_a_home_and_a_killed_one_holds_nothing(home: AgentHome) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(home.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(EnvironmentFault, match="another agent"), home.lock():
            pass
        holder.kill()
    with home.lock():
        pass


def answered(**changes: Any) -> Welcome:
    values: dict[str, Any] = {
        "name": "v",
        "fleet": "f",
        "node_id": 1,
        "mqtt": {"host": "h", "port": 1, "tls": True, "username": "v", "password": "secret"},
        "repository": "/repository",
        "tuf_root": None,
        "time": 0.0,
    }
    return Welcome(**{**values, **changes})


class Server:
    """Stands for ``connection.welcome``: what it answers, or the error that it raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Welcome | Exception = answered()
        monkeypatch.setattr(contact, "welcome", self)

    def __call__(self, connection: object) -> Welcome:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_welcome_is_kept_private_and_the_root_pinned_for_ever(
    home: AgentHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, connection = Server(monkeypatch), None
    server.answer = Unreachable("down")
    with pytest.raises(RefusedError, match="down"):
        contact.enter_or_remember(home, connection)  # type: ignore[arg-type]
    server.answer = answered()
    assert contact.enter(home, connection).name == "v"  # type: ignore[arg-type]
    assert contact.pinned_root(home) is None
    assert home.welcome_file.stat().st_mode & 0o077 == 0
    server.answer = answered(tuf_root="first")
    contact.enter(home, connection)  # type: ignore[arg-type]
    server.answer = answered(tuf_root="another")
    contact.enter(home, connection)  # type: ignore[arg-type]
    assert contact.pinned_root(home) == b"first"
    server.answer = Unreachable("down")
    assert contact.enter_or_remember(home, connection).name == "v"  # type: ignore[arg-type]
    with pytest.raises(Unreachable):
        contact.enter(home, connection)  # type: ignore[arg-type]
    home.welcome_file.write_text("{")
    assert contact.stored_welcome(home) is None
    with pytest.raises(RefusedError):
        contact.enter_or_remember(home, connection)  # type: ignore[arg-type]


def test_init_makes_a_whole_home_or_nothing(tmp_path: Path) -> None:
    ca.create_ca(tmp_path / "ca", "f")
    authority = tmp_path / "ca" / ca.CA_NAME
    target = tmp_path / "agent"
    for options, word in [
        (["--server", "ftp://x", "--ca", authority], "https"),
        (["--server", "https://x", "--ca", tmp_path / "none.pem"], "none.pem"),
        (["--server", "https://x", "--ca", authority, "--application", "tetris"], "toy_regression"),
        (["--server", "https://x", "--ca", authority, "--name", "a b"], "--name"),
    ]:
        done = fieldfleet("agent", "init", target, *options)
        assert done.returncode == 2, done.stderr
        assert word in done.stderr
        assert "Traceback" not in done.stderr
        assert not target.exists()
    done = fieldfleet("agent", "init", target, "--server", "localhost:5", "--ca", authority, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["public_key"] == str(target / "keys" / "device.pub")
    again = fieldfleet("agent", "init", target, "--server", "https://x", "--ca", authority)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    status = fieldfleet("agent", "status", target, "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["models"] == {}
    back = fieldfleet("agent", "roll-back", target)
    assert back.returncode in (2, 3)
    assert "Traceback" not in back.stderr


def test_an_application_that_is_not_installed_is_named_before_any_work(home: AgentHome) -> None:
    text = home.settings_file.read_text(encoding="utf-8")
    home.settings_file.write_text(text.replace('["toy_regression"]', '["toy_regression", "tetris"]'), encoding="utf-8")
    done = fieldfleet("agent", "run", home.folder)
    assert done.returncode == 2
    assert "tetris" in done.stderr
    assert "driver_conflict" in done.stderr


def test_data_of_several_applications(home: AgentHome) -> None:
    text = home.settings_file.read_text(encoding="utf-8").replace('["toy_regression"]', '["a", "b"]')
    home.settings_file.write_text(text + '\n[applications.b]\ndata = "/leaves"\nchannel = "beta"\n', encoding="utf-8")
    settings, folder = home.settings(), home.folder
    assert home.data_folders(settings) == {"a": folder / "data" / "a", "b": Path("/leaves")}
    assert home.data_folders(settings, [str(folder)]) == {"a": folder / "a", "b": folder / "b"}
    assert home.data_folders(settings, [f"b={folder}"]) == {"a": folder / "data" / "a", "b": folder}
    with pytest.raises(InputError, match="NAME=FOLDER"):
        home.data_folders(settings, [f"c={folder}"])
    assert (settings.of("a").channel, settings.of("b").channel) == ("stable", "beta")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["toy_regression"]', '["a", "a"]', ["twice"]),
        ('["toy_regression"]', '["a/b"]', ["device.applications"]),
        ('["toy_regression"]', '["a"]\napplication = "b"', ["contradict"]),
        ("[grpc]", '[applications.other]\ndata = "x"\n[grpc]', ["applications.other", "toy_regression"]),
        ("[grpc]", '[applications.toy_regression]\ndat = "x"\n[grpc]', ["applications.toy_regression.dat", "data"]),
        ("[grpc]", '[applications.toy_regression]\nchannel = "a/b"\n[grpc]', ["channel"]),
    ],
)
def test_wrong_settings_of_applications(home: AgentHome, old: str, new: str, words: list[str]) -> None:
    text = home.settings_file.read_text(encoding="utf-8")
    home.settings_file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        home.settings()
    for word in [str(home.settings_file), *words]:
        assert word in str(caught.value)
