"""What may go wrong between a server and its devices: kill -9 on either side, crashes, strangers, expired certificates."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import MessageType

from fieldfleet.__main__ import main
from fl_core.flower.messages import Reply
from fl_core.identity import ca, keys
from fl_server.home import ServerHome
from fl_server.link_grid import LinkGrid
from fl_server.superlink import SuperLink
from tests.federation import ARRAYS, DeviceProcess, devices, new_home, new_key, request, running, server_run
from tests.helpers import eventually
from tests.mqtt_helpers import free_port


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[SuperLink]:
    with running(new_home(tmp_path / "home")) as found:
        yield found


def begin(grid: LinkGrid, round: int = 1) -> dict[str, str]:
    """Ask every online device; device name -> instruction id."""
    content, nodes = request(round).to_record(), grid.device_names()
    messages = [grid.create_message(content, MessageType.TRAIN, node, f"train-{round}") for node in nodes]
    return dict(zip(nodes.values(), grid.push_messages(messages), strict=True))


def collect(grid: LinkGrid, asked: dict[str, str], timeout: float) -> dict[str, Reply | str]:
    """device -> reply, or the reason of its error reply; the late ones are missing."""
    deadline, waiting, found = time.monotonic() + timeout, set(asked.values()), dict[str, Reply | str]()
    while waiting and (ready := grid.wait_ready(waiting, deadline - time.monotonic())):
        waiting -= ready
        for name, message_id in asked.items():
            if message_id in ready:
                (message,) = grid.pull_messages([message_id])
                found[name] = (
                    message.error.reason if message.has_error() else Reply.from_record(message.content, origin=name)
                )
    grid.forget(asked.values())
    return found


def values(reply: Reply | str) -> list[float]:
    assert isinstance(reply, Reply), reply
    return np.asarray(reply.arrays["weight"]).ravel().tolist()


def test_killed_in_mid_round_and_restarted_at_once_it_rejoins_and_answers(superlink: SuperLink, tmp_path: Path) -> None:
    with devices(superlink, tmp_path, "van-1", "van-2") as (one, two):
        grid = superlink.grid()
        grid.wait_devices(2, 30)
        nodes = dict(grid.device_names())
        one.switch("hold", True)
        asked = begin(grid)
        eventually(one.seen, 30)
        one.stop(signal.SIGKILL)
        one.switch("hold", False)
        one.start()
        found = collect(grid, asked, 60)
        assert values(found["van-1"]) == values(found["van-2"]) == (ARRAYS["weight"] + 1).ravel().tolist()
        assert dict(grid.device_names()) == nodes, "the same key is the same node"
        assert values(collect(grid, begin(grid, 2), 60)["van-1"])
        assert two.seen() == [1, 2]


def test_killed_in_mid_round_it_costs_the_round_its_deadline_only(superlink: SuperLink, tmp_path: Path) -> None:
    with devices(superlink, tmp_path, "van-1", "van-2") as (one, _):
        grid = superlink.grid()
        grid.wait_devices(2, 30)
        collect(grid, begin(grid), 60)  # workers are warm
        one.switch("hold", True)
        asked = begin(grid, 2)
        eventually(lambda: 2 in one.seen(), 30)
        one.stop(signal.SIGKILL)
        began = time.monotonic()
        found = collect(grid, asked, 3)
        assert time.monotonic() - began < 4
        assert list(found) == ["van-2"]
        one.switch("hold", False)
        one.start()
        eventually(lambda: len(grid.device_names()) == 2, 30)
        one.wait_event("joined")
        assert set(collect(grid, begin(grid, 3), 60)) == {"van-1", "van-2"}
        assert 2 not in one.seen()[2:], "what the server has forgotten is not done again"


def test_killed_while_waiting_it_is_offline_at_once(superlink: SuperLink, tmp_path: Path) -> None:
    with devices(superlink, tmp_path, "van-1") as (one,):
        grid = superlink.grid()
        grid.wait_devices(1, 30)
        eventually(lambda: superlink.bell._doors, 10)
        one.stop(signal.SIGKILL)
        eventually(lambda: not grid.device_names(), 5)


def test_a_stopped_device_says_goodbye(superlink: SuperLink, tmp_path: Path) -> None:
    with devices(superlink, tmp_path, "van-1") as (one,):
        grid = superlink.grid()
        grid.wait_devices(1, 30)
        began = time.monotonic()
        assert one.stop() == 0
        assert time.monotonic() - began < 5
        assert not grid.device_names()


def test_a_crash_of_the_worker_is_an_error_reply_and_the_next_round_works(superlink: SuperLink, tmp_path: Path) -> None:
    with devices(superlink, tmp_path, "van-1") as (one,):
        grid = superlink.grid()
        grid.wait_devices(1, 30)
        one.switch("crash", True)
        assert "exit code 7" in str(collect(grid, begin(grid), 60)["van-1"])
        one.switch("crash", False)
        one.switch("fail", True)
        assert "as the test asked" in str(collect(grid, begin(grid, 2), 60)["van-1"])
        one.switch("fail", False)
        assert values(collect(grid, begin(grid, 3), 60)["van-1"])
        assert one.wait_event("worker_failed")


def test_a_worker_that_cannot_start_is_an_error_reply(superlink: SuperLink, tmp_path: Path) -> None:
    device = DeviceProcess(superlink.url, superlink.home.ca_file, tmp_path, "van-1", ["/nonexistent/worker"])
    superlink.registry.register("van-1", keys.public_pem(device.key))
    device.start()
    try:
        grid = superlink.grid()
        grid.wait_devices(1, 30)
        assert "nonexistent" in str(collect(grid, begin(grid), 60)["van-1"])
    finally:
        device.stop()


def test_an_unregistered_device_keeps_asking_and_joins_when_it_is_registered(
    superlink: SuperLink, tmp_path: Path
) -> None:
    with unattended(DeviceProcess(superlink.url, superlink.home.ca_file, tmp_path, "stranger")) as device:
        reason = device.wait_event("refused", 60)["reason"]
        assert "not registered" in reason
        assert "fleet register" in reason
        superlink.registry.register("stranger", keys.public_pem(device.key))
        assert device.wait_event("joined", 60)["name"] == "stranger"
        assert "Traceback" not in device.log()
    superlink.registry.revoke("stranger")


def test_a_server_of_another_authority_is_refused(superlink: SuperLink, tmp_path: Path) -> None:
    ca.create_ca(tmp_path / "other", "other")
    with unattended(DeviceProcess(superlink.url, tmp_path / "other" / "ca.pem", tmp_path, "van-1")) as device:
        assert "certificate was refused" in device.wait_event("refused", 60)["reason"]


@contextmanager
def unattended(device: DeviceProcess) -> Iterator[DeviceProcess]:
    """Nothing that the server does may end it."""
    device.start()
    assert device.process is not None
    try:
        yield device
        assert device.process.poll() is None, device.log()
    finally:
        device.stop()


def test_the_server_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Its devices keep trying and hand in what they finished meanwhile; nothing is trained twice."""
    home, port = new_home(tmp_path / "home"), free_port()
    device = DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, tmp_path, "van-1")
    try:
        with running(home, port=port) as superlink:
            superlink.registry.register("van-1", keys.public_pem(device.key))
            device.start()
            grid = superlink.grid()
            grid.wait_devices(1, 30)
            device.switch("hold", True)
            begin(grid)
            eventually(device.seen, 30)
            run = grid.run
        device.switch("hold", False)
        eventually(lambda: list((device.folder / "fleet" / "outbox").glob("*.reply")), 30)
        device.wait_event("away")
        with running(home, port=port) as superlink:
            (message_id,) = superlink.store.pending(run, "train-1")
            eventually(lambda: message_id in superlink.store.ready(run), 60)
            eventually(lambda: not list((device.folder / "fleet" / "outbox").glob("*.reply")), 30)
            assert device.seen() == [1]
            grid = superlink.grid()
            grid.wait_devices(1, 60)
            assert values(collect(grid, begin(grid, 2), 60)["van-1"])
    finally:
        device.stop()


def test_an_empty_store_is_filled_again(tmp_path: Path) -> None:
    """A lost state.db costs the rounds under way; devices join again under new node ids."""
    home, port = new_home(tmp_path / "home"), free_port()
    device = DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, tmp_path, "van-1")
    try:
        with running(home, port=port) as superlink:
            superlink.registry.register("van-1", keys.public_pem(device.key))
            device.start()
            superlink.grid().wait_devices(1, 30)
        for file in home.path.glob("state.db*"):
            file.unlink()
        with running(home, port=port) as superlink:
            grid = superlink.grid()
            grid.wait_devices(1, 60)
            assert values(collect(grid, begin(grid), 60)["van-1"])
    finally:
        device.stop()


def test_kill_9_of_the_server_in_mid_round_resumes_at_that_round(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out"
    home = new_home(tmp_path / "home", port=port)
    registry = home.registry()
    found = []
    for name in ("van-1", "van-2"):
        device = DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, tmp_path, name)
        registry.register(name, keys.public_pem(device.key))
        found.append(device)
    registry.close()
    server = server_run(home.path, out, "--set", "algorithm.evaluate_every=0")
    try:
        for device in found:
            device.start()
        eventually(lambda: (out / "round-00002").is_dir(), 60)
        found[0].switch("hold", True)
        eventually(lambda: any(r > 2 for r in found[0].seen()) or server.poll() is not None, 30)
        server.kill()
        server.communicate(timeout=20)
        finished = sorted(out.glob("round-*"))[-1].name
        assert not (out / "final").exists()
        found[0].switch("hold", False)
        server = server_run(home.path, out, "--set", "algorithm.evaluate_every=0")
        _, errors = server.communicate(timeout=90)
        assert server.returncode == 0, errors
        assert (out / "final").is_dir()
        assert finished >= "round-00002"
        assert (out / "round-00004").is_dir()
    finally:
        server.kill()
        server.communicate()
        for device in found:
            device.stop()


def test_sigterm_ends_a_run_cleanly(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", port=free_port())
    server = server_run(home.path, tmp_path / "out")
    assert server.stderr is not None
    assert any("listening" in line for line in server.stderr)
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 130
    assert "Traceback" not in errors


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``fieldfleet ARGUMENTS`` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def test_commands_refuse_with_file_date_and_remedy(command: Command, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", port=free_port())
    arguments = ("server", "run", "toy_regression", "--home", home.path, "--rounds", "1", "--out", tmp_path / "out")
    code, _, errors = command(*arguments, "--wait", "0")
    assert code == 4
    assert "no other device is registered" in errors
    ca.issue_server_certificate(home.path / "ca", home.path / "tls", ["localhost"], days=0)
    code, _, errors = command(*arguments)
    assert code == 3
    assert "server.pem: this certificate expired on 20" in errors
    assert f"fieldfleet server renew --home {home.path}" in errors
    assert command("server", "renew", "--home", home.path)[0] == 0
    with running(home, port=home.settings.listen.port):
        code, _, errors = command(*arguments)
    assert code == 3
    assert f"port {home.settings.listen.port}" in errors
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (["--rounds", "0"], 2, "--rounds 0"),
        (["--from", "nowhere"], 2, "nowhere: not a checkpoint"),
        (["--home", "nowhere"], 2, "server init nowhere"),
        (["--set", "algorithm.name=nope"], 2, "known: "),
        (["--min-devices", "-1"], 2, "--min-devices"),
        (["--out", "/"], 2, "--out /"),
    ],
)
def test_wrong_arguments_are_refused_before_work(
    command: Command, tmp_path: Path, change: list[str], code: int, text: str
) -> None:
    home = new_home(tmp_path / "home")
    arguments = ["--home", str(home.path), "--rounds", "1", "--out", str(tmp_path / "out"), *change]
    found, _, errors = command("server", "run", "toy_regression", *arguments)
    assert found == code
    assert text in errors
    assert not home.state_file.exists()
    assert not (tmp_path / "out").exists()


def test_init_from_the_command_line(command: Command, tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, out, _ = command("server", "init", home, "--name", "field.example", "--mqtt", "broker.example:1884", "--json")
    assert code == 0
    assert json.loads(out)["ca"] == str(home / "ca" / "ca.pem")
    settings = ServerHome(home).settings
    assert (settings.mqtt.mode, settings.mqtt.host, settings.mqtt.port) == ("external", "broker.example", 1884)
    assert settings.listen.names == ("field.example",)
    assert command("server", "init", home)[0] == 2
    assert command("server", "init", tmp_path / "b", "--mqtt", "nonsense")[0] == 2
    assert command("server", "init", tmp_path / "c", "--port", "0")[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]


def test_register_from_the_command_line(command: Command, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    new_key(tmp_path)
    for _ in range(2):
        assert command("server", "register", tmp_path / "device.pub", "--name", "van-1", "--home", home.path)[0] == 0
    code, _, errors = command("server", "register", tmp_path / "device.pub", "--name", "van-2", "--home", home.path)
    assert (code, "van-1" in errors) == (2, True)
    code, _, errors = command("server", "register", tmp_path / "device.key", "--name", "van-2", "--home", home.path)
    assert (code, "private key" in errors) == (2, True)
    assert command("fleet", "revoke", "van-9", "--home", home.path)[0] == 2
    assert command("fleet", "revoke", "van-1", "--home", home.path)[0] == 0
    assert "revoked" in command("fleet", "list", "--home", home.path)[1]
