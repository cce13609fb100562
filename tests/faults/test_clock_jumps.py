"""Wall clocks that are wrong by a day, or jump, on a device and on the server (libfaketime under the real processes)."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fl_core.identity import keys
from fl_server.history import read_history
from tests.faketime import Clock
from tests.fault_arena import NAMES, arena
from tests.fault_table import Fault
from tests.federation import DeviceProcess, new_home, server_run
from tests.helpers import eventually
from tests.mqtt_helpers import free_port

pytestmark = pytest.mark.slow
DAY = 86_400
ROUNDS = 3
VICTIM = NAMES[0]


@pytest.mark.parametrize("days", [1, -1])
def test_a_device_whose_clock_is_wrong_from_its_start(fault: Fault, tmp_path: Path, days: int) -> None:
    fault.about(
        "clock (device)", f"wrong by {days:+d} day from its start", "corrected by the server's; every round counts it"
    )
    clock = Clock(tmp_path / "clock")
    clock.set(days * DAY)

    def prepare(device: DeviceProcess) -> None:
        if device.name == VICTIM:
            device.environment = clock.environment

    with fault.recovery(), arena(tmp_path, prepare=prepare) as field:
        field.begin(ROUNDS)
        field.finish()
        field.check_model()
        field.check_trained()


@pytest.mark.parametrize("days", [1, -1])
def test_a_device_whose_clock_jumps(fault: Fault, tmp_path: Path, days: int) -> None:
    fault.about(
        "clock (device)", f"jumps by {days:+d} day in mid-round, then kill -9", "same round, trained once, counted once"
    )
    clock = Clock(tmp_path / "clock")

    def prepare(device: DeviceProcess) -> None:
        if device.name == VICTIM:
            device.environment = clock.environment

    with arena(tmp_path, prepare=prepare) as field:
        victim, other = field.device(VICTIM), field.device(NAMES[1])
        field.after[1] = lambda: other.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: [e for e, _ in victim.events].count("reply") == 2, 60)
        clock.set(days * DAY)
        victim.stop(signal.SIGKILL)
        other.switch("hold", False)
        with fault.recovery():
            victim.start()
            field.finish()
        field.check_model()
        field.check_trained()


@pytest.mark.parametrize("days", [1, -1])
def test_a_server_whose_clock_jumps(fault: Fault, tmp_path: Path, days: int) -> None:
    fault.about(
        "clock (server)",
        f"jumps by {days:+d} day in mid-round",
        "nobody exits, devices follow it, every round counts all",
    )
    clock, port, out = Clock(tmp_path / "clock"), free_port(), tmp_path / "out"
    home = new_home(tmp_path / "home", port=port)
    registry = home.registry()
    found = [DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, tmp_path, name) for name in NAMES]
    options = ["--set", "algorithm.evaluate_every=0", "--set", "algorithm.min_clients=2"]
    options += ["--set", "algorithm.deadline_s=25"]
    server = None
    try:
        for device in found:
            registry.register(device.name, keys.public_pem(device.key))
            device.switch("hold", True)
            device.start()
        server = server_run(home.path, out, *options, environment=clock.environment)
        eventually(lambda: all(device.seen() for device in found), 90)
        clock.set(days * DAY)
        with fault.recovery():
            for device in found:
                device.switch("hold", False)
            _, errors = server.communicate(timeout=120)
        assert server.returncode == 0, errors
        records = read_history(out)
        whole = [sorted(record.clients) == sorted(NAMES) for record in records]
        assert whole == [True, True, True, True], errors
        for device in found:
            assert device.seen() == [1, 2, 3, 4]
            assert device.process is not None
            assert device.process.poll() is None
    finally:
        registry.close()
        if server is not None:
            server.kill()
            server.communicate()
        for device in found:
            if device.process is not None:
                device.stop()
