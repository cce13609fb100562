"""No space left, on a device and on the server: work goes on where it can, and where it cannot nothing is lost."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from fl_core.identity import keys
from fl_server.history import read_history
from tests.fault_arena import NAMES, arena
from tests.fault_table import Fault
from tests.federation import DeviceProcess, new_home, server_run
from tests.helpers import eventually
from tests.mqtt_helpers import free_port
from tests.small_disk import small_disk

ROUNDS = 3
VICTIM = NAMES[0]


def test_a_device_whose_files_may_not_grow(fault: Fault, tmp_path: Path) -> None:
    """By RLIMIT_FSIZE on the running process, which needs no rights; ``write`` fails with EFBIG instead of ENOSPC."""
    fault.about(
        "full disk (device)", "writing fails while it answers", "handed in from memory; trained once, counted once"
    )
    with arena(tmp_path) as field:
        victim = field.device(VICTIM)
        assert victim.process is not None
        before = resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE)
        field.after[1] = lambda: victim.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in victim.seen(), 60)
        resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE, (16, before[1]))
        with fault.recovery():
            victim.switch("hold", False)
            field.wait_round(2)
        resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE, before)
        field.finish()
        field.check_model()
        field.check_trained()


@pytest.mark.slow
def test_a_device_with_a_full_disk(fault: Fault, tmp_path: Path) -> None:
    fault.about(
        "full disk (device)", "the whole disk, for two rounds", "handed in from memory; trained once, counted once"
    )
    with small_disk(tmp_path / VICTIM / "fleet", 1) as disk, arena(tmp_path) as field:
        victim = field.device(VICTIM)
        field.after[1] = lambda: victim.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in victim.seen(), 60)
        disk.fill()
        with fault.recovery():
            victim.switch("hold", False)
            field.wait_round(2)
        field.wait_round(3)
        disk.clear()
        field.finish()
        field.check_model()
        field.check_trained()


@pytest.mark.slow
def test_a_server_with_a_full_disk_while_replies_arrive(fault: Fault, tmp_path: Path) -> None:
    fault.about(
        "full disk (server)", "replies arriving", "refused with 503, kept by devices, taken when there is space"
    )
    with small_disk(tmp_path / "disk", 16) as disk, arena(tmp_path, home=new_home(disk.folder / "home")) as field:
        field.after[1] = lambda: [device.switch("hold", True) for device in field.devices]
        field.begin(ROUNDS)
        eventually(lambda: all(2 in device.seen() for device in field.devices), 60)
        disk.fill()
        for device in field.devices:
            device.switch("hold", False)
        for device in field.devices:
            eventually(lambda d=device: any(event == "away" for event, _ in d.events), 60)
        assert len(field.records) == 1
        disk.clear()
        with fault.recovery():
            field.wait_round(2)
        field.finish()
        field.check_model()
        field.check_trained()
        field.check_acknowledged()


@pytest.mark.slow
def test_a_server_that_cannot_save_its_model(fault: Fault, tmp_path: Path) -> None:
    """It ends and says why; the same command goes on in the same round when there is space."""
    fault.about(
        "full disk (server)", "model being saved", "exit code 3 naming the folder; same round after, same weights"
    )
    port = free_port()
    home, out = new_home(tmp_path / "home", port=port), tmp_path / "disk" / "out"
    registry = home.registry()
    found = [DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, tmp_path, name) for name in NAMES]
    with small_disk(tmp_path / "disk", 1) as disk:
        server = None
        try:
            for device in found:
                registry.register(device.name, keys.public_pem(device.key))
                device.switch("hold", True)
                device.start()
            server = server_run(
                home.path, out, "--set", "algorithm.evaluate_every=0", "--set", "algorithm.min_clients=2"
            )
            eventually(lambda: all(device.seen() for device in found), 90)
            disk.fill(leave=4096)  # room for the line of the history, not for the model
            for device in found:
                device.switch("hold", False)
            _, errors = server.communicate(timeout=90)
            assert server.returncode == 3, errors
            assert "Traceback" not in errors
            assert str(out) in errors
            assert "No space left" in errors
            disk.clear()
            with fault.recovery():
                server = server_run(
                    home.path, out, "--set", "algorithm.evaluate_every=0", "--set", "algorithm.min_clients=2"
                )
                _, errors = server.communicate(timeout=90)
            assert server.returncode == 0, errors
            records = read_history(out)
            assert [sorted(record.clients) for record in records] == [sorted(NAMES)] * 4
            for device in found:
                assert device.seen() == [1, 2, 3, 4], "the round of the full disk was not trained again"
        finally:
            registry.close()
            if server is not None:
                server.kill()
                server.communicate()
            for device in found:
                device.stop()
