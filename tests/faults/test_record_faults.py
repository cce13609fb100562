"""Store and forward under kill -9 of both ends and outages of the broker: every record is read once, in order."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_server.device_table import DATABASE_NAME
from fl_server.telemetry import Telemetry
from tests.helpers import ROOT, eventually
from tests.mqtt_helpers import BROKERS, PASSWORDS, free_port, running_broker, topics
from tests.record_server import identities

TOTAL = 150


class Ends:
    """The two processes; each may be killed and started again at any time."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.commands = {
            "device": [
                "tests.record_device",
                str(folder / "device"),
                "van-1",
                PASSWORDS["van-1"],
                str(port),
                str(TOTAL),
            ],
            "server": ["tests.record_server", str(folder / "server"), str(port), PASSWORDS[topics.SERVER_ACCOUNT]],
        }
        self.running: dict[str, subprocess.Popen[str]] = {}
        (folder / "device").mkdir()
        identities(folder / "server", folder / "device")

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", *self.commands[name]]
        self.running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def line(self, name: str) -> str:
        stream: Any = self.running[name].stdout
        return str(stream.readline()).strip()

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()
        stream: Any = process.stdout
        stream.close()

    def stop(self) -> None:
        for name in list(self.running):
            self.kill(name)


def count(telemetry: Telemetry) -> int:
    return len(telemetry.read(limit=10 * TOTAL))


@pytest.mark.parametrize("kind", BROKERS)
def test_each_record_is_read_once_whatever_is_killed(kind: str, tmp_path: Path) -> None:
    chance = random.Random(kind)
    telemetry = Telemetry(tmp_path / "server" / DATABASE_NAME)
    seen: list[int] = []
    with running_broker(kind, tmp_path / "broker") as broker:
        ends = Ends(tmp_path, broker.port)
        try:
            ends.start("server")
            ends.start("device")
            for _ in range(4):
                victim = chance.choice(["device", "server"])
                before = count(telemetry)
                goal = before + chance.randrange(1, 12)
                eventually(lambda goal=goal: count(telemetry) >= min(goal, TOTAL), 60)
                ends.kill(victim)
                reader = telemetry.reader("test")  # also a reader that is stopped and started again
                seen += [entry.body["n"] for entry in reader]
                reader.commit()
                ends.start(victim)
            eventually(lambda: count(telemetry) == TOTAL, 60)
        finally:
            ends.stop()
    reader = telemetry.reader("test")
    seen += [entry.body["n"] for entry in reader]
    reader.commit()
    assert seen == list(range(1, TOTAL + 1))
    assert telemetry.missing() == {"van-1": 0}
    assert list(telemetry.reader("test")) == []
    telemetry.close()


def test_records_wait_for_a_broker_and_a_server_that_are_away(tmp_path: Path) -> None:
    port = free_port()
    ends = Ends(tmp_path, port)
    telemetry = Telemetry(tmp_path / "server" / DATABASE_NAME)
    try:
        ends.start("device")
        eventually(lambda: ends.line("device") == str(TOTAL), 60)
        ends.kill("device")
        from tests.mqtt_helpers import embedded

        broker = embedded(port)
        broker.start()
        try:
            ends.start("device")  # the broker takes what nobody reads: the device keeps it
            ends.start("server")
            assert ends.line("server") == "up"
            assert ends.line("device") == "delivered"
            assert [entry.body["n"] for entry in telemetry.read(limit=10 * TOTAL)] == list(range(1, TOTAL + 1))
        finally:
            ends.stop()
            broker.stop()
    finally:
        ends.stop()
        telemetry.close()
