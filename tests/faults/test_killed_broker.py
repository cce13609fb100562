"""kill -9 of the broker in each phase of a round whose devices reach nothing but the broker (mosquitto, TLS)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fl_clients.training.link import FleetLink
from tests.fault_arena import BIG, NAMES, Arena
from tests.fault_table import Fault
from tests.federation import DeviceProcess
from tests.helpers import eventually
from tests.mqtt_helpers import needs_mosquitto
from tests.tunnels import BrokerDevice, Station

pytestmark = [pytest.mark.slow, needs_mosquitto]
ROUNDS = 3


class TunnelDevice(DeviceProcess):
    """A FleetLink in this process, its worker in another; everything goes through the broker."""

    def __init__(self, station: Station, name: str) -> None:
        super().__init__("", station.home.ca_file, station.folder, name)
        self.reach = BrokerDevice(station, name)
        self._ending = threading.Event()
        self._link = FleetLink(
            self.reach.connection,
            self.folder / "fleet",
            self.worker,
            on_event=lambda event, facts: self.events.append((event, dict(facts))),
            poll_seconds=20,
        )
        self._thread = threading.Thread(target=self._link.run, args=(self._ending,), daemon=True)

    def start(self) -> TunnelDevice:
        self.reach.start()
        self._thread.start()
        return self

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        self._ending.set()
        self.reach.tunnel.close()
        self._thread.join(timeout)
        self.reach.session.stop()
        return 0

    def log(self) -> str:
        return ""


@contextmanager
def behind_a_broker(folder: Path) -> Iterator[tuple[Arena, Station]]:
    station = Station(folder, "mosquitto")
    station.start()
    devices: list[DeviceProcess] = []
    try:
        for name in NAMES:
            device = TunnelDevice(station, name)
            device.switch("vary", True)
            device.start()
            devices.append(device)
        field = Arena(station.superlink, devices, folder / "out", None, BIG)
        try:
            yield field, station
        finally:
            field.close()
    finally:
        for device in devices:
            device.stop()
        station.stop()


def sending(field: Arena, kill: Callable[[], None]) -> None:
    eventually(lambda: len(field.records) == 1, 60)
    kill()


def training(field: Arena, kill: Callable[[], None]) -> None:
    eventually(lambda: all(2 in device.seen() for device in field.devices), 60)
    kill()


def replying(field: Arena, kill: Callable[[], None]) -> None:
    eventually(lambda: all(2 in device.seen() for device in field.devices), 60)
    for device in field.devices:
        device.switch("hold", False)
    eventually(lambda: list(field.devices[0].folder.glob("fleet/outbox/*.reply")), 60)
    kill()


PHASES = {"instructions being sent": sending, "training": training, "replies being sent": replying}


@pytest.mark.parametrize("phase", PHASES)
def test_the_round_goes_on(fault: Fault, tmp_path: Path, phase: str) -> None:
    fault.about("kill -9 broker", phase, "same round through the broker's next life; trained once, counted once")
    with behind_a_broker(tmp_path) as (field, station):
        if phase != "instructions being sent":
            field.after[1] = lambda: [device.switch("hold", True) for device in field.devices]  # type: ignore[assignment,return-value]
        field.begin(ROUNDS)
        PHASES[phase](field, lambda: station.stop_broker(signal.SIGKILL))
        for device in field.devices:
            device.switch("hold", False)
        with fault.recovery():
            station.start_broker()
            field.wait_round(2)
        field.finish()
        field.check_model()
        field.check_trained()
        eventually(lambda: all(not list(d.folder.glob("fleet/outbox/*.reply")) for d in field.devices), 60)
