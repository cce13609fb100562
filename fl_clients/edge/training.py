"""The agent's part in federations: the fleet link on a thread of its own, where torch and flwr are installed."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_clients.connection import Transport
from fl_clients.edge.capabilities import missing_for_training
from fl_clients.edge.condition import Condition
from fl_core.contracts.errors import FieldfleetError

LOG = logging.getLogger(__name__)
OnEvent = Callable[[str, Mapping[str, Any]], None]


class Training:
    """state: "off", or what the fleet link said last: joined, away, refused. held: "waiting: why" or "paused: why" by the
    owner's policy, "" = not.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self.state, self.held = "off", ""
        self._on_event = on_event
        self._link: Any = None

    def facts(self) -> dict[str, Any]:
        """crashes: of the worker in a row. disabled: why nothing is trained for the present run, "" while it is."""
        link = self._link
        if link is None:
            return {"state": self.state, "crashes": 0, "disabled": "", "replies_waiting": 0}
        circuit = link.breaker.circuit
        return {
            "state": self.held or self.state,
            "crashes": circuit.crashes,
            "disabled": circuit.disabled,
            "replies_waiting": link.outbox.depth(),
            "worker": link.worker.pid is not None,
        }

    def enable(self) -> None:
        """An operator's word: forget the worker's crashes."""
        if self._link is not None:
            self._link.breaker.reset()

    @staticmethod
    def possible() -> bool:
        missing = missing_for_training()
        if missing:
            LOG.info("agent: no training here, %s is not installed", missing)
        return not missing

    def run(
        self,
        transport: Transport,
        folder: Path,
        command: list[str],
        *,
        wake: threading.Event,
        wake_ready: Callable[[], bool],
        stop: threading.Event,
        permit: Condition,
    ) -> None:
        # By name: the torch-free half never imports the training half.
        module = importlib.import_module("fl_clients.training.link")
        try:
            link = module.FleetLink(transport, folder, command, wake, self._heard, wake_ready=wake_ready, permit=permit)
        except FieldfleetError as error:
            LOG.error("agent: no training: %s", error)
            return
        self._link = link
        link.run(stop)

    def _heard(self, event: str, facts: Mapping[str, Any]) -> None:
        if event in ("joined", "away", "refused"):
            self.state, self.held = event, ""
        elif event in ("waiting", "paused"):
            self.held = f"{event}: {facts['reason']}"
        elif event == "resumed":
            self.held = ""
        self._on_event(event, facts)


def worker_command(name: str, data: Mapping[str, Path], states: Path) -> list[str]:
    """The training worker's command line: a process of its own, started by the fleet link when there is work.

    data: application -> folder; under "" where the device names no application. states: folder for what federated
    algorithms keep on this device.
    """
    command = [sys.executable, "-m", "fl_clients.training.worker", "--name", name, "--states", str(states)]
    for application, folder in data.items():
        command += ["--data", f"{application}={folder}"] if len(data) > 1 else ["--data", str(folder)]
        command += ["--application", application] if application else []
    return command
