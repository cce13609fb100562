"""A running server with MQTT and one registered device whose agent is the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fl_core.delivery.publication import publish_bundle
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_server.bridge import Bridge
from fl_server.field import FieldService
from fl_server.home import ListenSettings, MqttSettings, ServerSettings, create_home
from fl_server.superlink import SuperLink
from tests.bundles import TOY, toy_bundle
from tests.helpers import ROOT, fieldfleet
from tests.mqtt_helpers import free_port

NAME = "van-1"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("FIELDFLEET_DATA", "PYTHONPATH")}


class Field:
    """start() ... stop(): the server's part. ``running`` is the agent."""

    def __init__(self, work: Path, *, mqtt: str = "embedded", applications: Sequence[str] = (TOY,)) -> None:
        self.work, self.applications = work, applications
        self.agent, self.data = work / "agent", work / "data"
        listen, settings = ListenSettings(port=free_port()), MqttSettings(mode=mqtt, port=free_port())
        self.home = create_home(work / "server", ServerSettings(fleet="test", listen=listen, mqtt=settings))
        for name in applications:
            app = application(name)
            raw = app.generate(app.configure(["data.clients=2"]), 0)
            folder = self.data if len(applications) == 1 else self.data / name
            raw.select(list(raw.client_ids()[:1])).write(folder)  # type: ignore[attr-defined]
        self.start()
        options = ["--server", self.superlink.url, "--ca", self.home.ca_file, "--name", NAME]
        chosen = [word for name in applications for word in ("--application", name)]
        made = fieldfleet("agent", "init", self.agent, *options, *chosen)
        assert made.returncode == 0, made.stderr
        self.init_output = made.stdout

    @property
    def predictions(self) -> Path:
        return self.agent / "applications" / TOY / "predictions"

    def start(self) -> None:
        self.superlink = SuperLink(self.home)
        self.superlink.start()
        self.service = FieldService(self.home, self.superlink.registry, tunnel=self.superlink.tunnel)
        self.service.start()

    def stop(self) -> None:
        self.service.stop()
        self.superlink.stop()

    @property
    def bridge(self) -> Bridge:
        assert self.service.bridge is not None
        return self.service.bridge

    def register(self) -> None:
        self.superlink.registry.register(NAME, keys.read_public_key(self.agent / "keys" / "device.pub"))

    def publish(self, seed: int) -> None:
        publish_bundle(toy_bundle(self.work / f"bundle-{seed}", seed=seed), self.home.repository)

    def device(self) -> dict[str, Any]:
        return next((d for d in self.bridge.devices() if d["name"] == NAME), {"alive": False, "state": {}})

    def ask(self, kind: str, job_id: str = "", timeout: float = 60, **body: Any) -> dict[str, Any]:
        reply = self.bridge.wait_reply(self.bridge.command(NAME, kind, body, job_id=job_id), timeout)
        assert reply is not None, f"no reply to {kind}\n{self.log()}"
        return reply

    def log(self) -> str:
        return (self.work / "agent.log").read_text()

    @contextmanager
    def running(self, *options: str, alive: bool = True, data: bool = True) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "fieldfleet", "agent", "run", str(self.agent)]
        command += ["--data", str(self.data)] if data else []
        with (self.work / "agent.log").open("ab") as log:
            process = subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=ROOT, env=ENVIRONMENT)
        try:
            assert not alive or self.bridge.wait_alive([NAME], 60), self.log()
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(30)
