"""Helpers for federation tests: a real SuperLink over TLS in this process, devices as threads or as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fl_clients.connection import ServerConnection, welcome
from fl_clients.training.fleet import FleetClient
from fl_core.contracts.arrays import Arrays
from fl_core.flower.messages import Request
from fl_core.identity import keys
from fl_server.home import ListenSettings, MqttSettings, ServerHome, ServerSettings, create_home
from fl_server.superlink import SuperLink
from tests.helpers import ROOT, eventually

ARRAYS: Arrays = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float64)}


def new_home(folder: Path, *, port: int = 1) -> ServerHome:
    settings = ServerSettings(fleet="test", listen=ListenSettings(port=port), mqtt=MqttSettings(mode="off"))
    return create_home(folder, settings)


_open: dict[str, list[ServerConnection]] = {}  # by server URL: closed before their server


@contextmanager
def running(home: ServerHome, *, port: int = 0) -> Iterator[SuperLink]:
    superlink = SuperLink(home, port=port)
    superlink.start()
    try:
        yield superlink
    finally:
        for connection in _open.pop(superlink.url, []):
            connection.close()
        superlink.stop()


def new_key(folder: Path) -> keys.PrivateKey:
    return keys.create_device_key(folder / "device.key")


def connect(superlink: SuperLink, key: keys.PrivateKey) -> ServerConnection:
    connection = ServerConnection(superlink.url, superlink.home.ca_file, key)
    _open.setdefault(superlink.url, []).append(connection)
    return connection


def joined(superlink: SuperLink, folder: Path, name: str, *, bulk: bool = True) -> FleetClient:
    """A registered device that speaks the protocol by hand, and is online."""
    key = new_key(folder / name)
    superlink.registry.register(name, keys.public_pem(key))
    client = FleetClient(connect(superlink, key), bulk=bulk)
    client.activate(welcome(client.connection).node_id)
    return client


def request(round: int = 1, arrays: Arrays = ARRAYS) -> Request:
    return Request(application="toy_regression", config={}, round=round, num_rounds=3, seed=0, arrays=arrays)


class DeviceProcess:
    """FleetLink in its own process, with the trivial worker of ``tests/echo_worker.py`` unless told otherwise."""

    def __init__(self, superlink_url: str, ca: Path, folder: Path, name: str, worker: list[str] | None = None) -> None:
        self.folder, self.name, self.url, self.ca = folder / name, name, superlink_url, ca
        self.switches = self.folder / "switches"
        self.switches.mkdir(parents=True)
        self.key = new_key(self.folder)
        self.worker = worker or [sys.executable, str(ROOT / "tests" / "echo_worker.py"), str(self.switches), name]
        self.program = [sys.executable, str(ROOT / "tests" / "link_device.py")]
        self.environment: dict[str, str] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> DeviceProcess:
        command = [*self.program, self.url, str(self.ca)]
        command += [str(self.folder / "device.key"), str(self.folder / "fleet"), *self.worker]
        with (self.folder / "log").open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
            )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        return self

    def switch(self, name: str, on: bool) -> None:
        file = self.switches / name
        file.touch() if on else file.unlink(missing_ok=True)

    def seen(self) -> list[int]:
        """Rounds of the requests that the worker began to answer."""
        file = self.switches / "seen"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def wait_event(self, name: str, timeout: float = 20.0) -> dict[str, Any]:
        return dict(eventually(lambda: next((f for e, f in self.events if e == name), None), timeout))

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        if self.process.stdout:
            self.process.stdout.close()
        return code

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event, facts = json.loads(line)
                self.events.append((event, facts))
        except ValueError:  # closed, or cut by a kill
            return


@contextmanager
def devices(superlink: SuperLink, folder: Path, *names: str) -> Iterator[list[DeviceProcess]]:
    """Registered devices, started; whatever is left of them is killed at the end."""
    found = [DeviceProcess(superlink.url, superlink.home.ca_file, folder, name) for name in names]
    try:
        for device in found:
            superlink.registry.register(device.name, keys.public_pem(device.key))
            device.start()
        yield found
    finally:
        for device in found:
            if device.process is not None:
                device.stop(signal.SIGKILL)


def server_run(home: Path, out: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fieldfleet", "server", "run", "toy_regression", "--home", str(home)]
    command += ["--rounds", "4", "--out", str(out), "--min-devices", "2", "--wait", "60", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
