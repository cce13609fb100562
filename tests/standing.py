"""``fieldfleet server start`` as its own process, with device processes around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fl_core.identity import keys
from fl_server.home import ListenSettings, MetricsSettings, MqttSettings, ServerHome, ServerSettings, create_home
from tests.federation import DeviceProcess
from tests.helpers import ROOT, eventually, fieldfleet
from tests.mqtt_helpers import free_port

LONG = 90.0


class Standing:
    """start() ... end(); ``run`` gives commands."""

    def __init__(self, folder: Path, *, mqtt: str = "off") -> None:
        settings = ServerSettings(
            fleet="test",
            listen=ListenSettings(port=free_port()),
            mqtt=MqttSettings(mode=mqtt, port=free_port()),
            metrics=MetricsSettings(port=free_port()),
        )
        self.folder, self.home = folder, create_home(folder / "home", settings)
        self.url = f"https://127.0.0.1:{settings.listen.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Returns what it says when it listens."""
        command = [sys.executable, "-m", "fieldfleet", "server", "start", "--home", str(self.home.path), "--json"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
            )
        assert self.process.stdout is not None
        lines = ""
        while "}" not in lines:
            line = self.process.stdout.readline()
            assert line, self.log()
            lines += line
        return dict(json.loads(lines))

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def run(self, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
        done = fieldfleet(*arguments, "--home", self.home.path, "--json", timeout=LONG)
        assert done.returncode == code, f"{done.stderr}\n{self.log()}"
        return dict(json.loads(done.stdout or "{}"))

    def facts(self, name: str) -> dict[str, Any]:
        registry = ServerHome(self.home.path).registry()
        try:
            return registry.runs.get(name).facts()
        finally:
            registry.close()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.home.settings.metrics.port}{path}", timeout=30
            ) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, sample: str) -> float:
        """The value of one sample, written with its labels; 0 where there is none."""
        lines = self.get("/metrics")[1].splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample), 0.0)

    @contextmanager
    def devices(self, *names: str) -> Iterator[list[DeviceProcess]]:
        found = [DeviceProcess(self.url, self.home.ca_file, self.folder, name) for name in names]
        registry = self.home.registry()
        try:
            for device in found:
                registry.register(device.name, keys.public_pem(device.key))
                device.start()
            yield found
        finally:
            registry.close()
            for device in found:
                device.stop(signal.SIGKILL)


@contextmanager
def standing(folder: Path, **options: str) -> Iterator[Standing]:
    server = Standing(folder, **options)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.end(signal.SIGKILL)


def until(condition: Any) -> Any:
    return eventually(condition, LONG, interval=0.05)
