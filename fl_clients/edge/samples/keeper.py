"""The agent's side of its samples: watches the inboxes, runs the intake when something lies there. Standard library only."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_clients.edge.home import AgentHome
from fl_clients.edge.samples.index import Limits, SampleIndex, prepare
from fl_clients.edge.settings import AgentSettings, SampleSettings
from fl_core.contracts.errors import FieldfleetError
from fl_core.link.backoff import Backoff

LOG = logging.getLogger(__name__)
EXPIRE_EVERY_S = 6 * 3_600.0
END_S = 5.0


@dataclass
class _Inbox:
    application: str
    store: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    not_before: float = 0.0
    added: int = 0
    last_run: float = field(default_factory=time.monotonic)
    backoff: Backoff = field(default_factory=lambda: Backoff(5.0, 600.0))


class SampleKeeper:
    """run() in a thread; ``summaries`` from any. changed(application): an intake ended that brought new samples. Does nothing on a device without samples."""

    def __init__(
        self, home: AgentHome, settings: AgentSettings, *, changed: Callable[[str], None] = lambda application: None
    ) -> None:
        self._changed = changed
        self._settings: SampleSettings = settings.samples
        self._home = home.folder
        self._inboxes: list[_Inbox] = []
        if settings.samples.enabled:
            limits = limits_of(settings.samples)
            for name, (store, folder) in places(home, settings).items():
                prepare(store, limits)
                folder.mkdir(parents=True, exist_ok=True)
                self._inboxes.append(_Inbox(name, store, folder))
        for inbox in self._inboxes:
            inbox.added = self.summaries().get(inbox.application, {}).get("added", 0)

    @property
    def inboxes(self) -> dict[str, Path]:
        """Application -> folder."""
        return {inbox.application: inbox.folder for inbox in self._inboxes}

    def run(self, stop: threading.Event) -> None:
        source = None
        try:
            source = self._open_source()
            while not stop.is_set():
                for inbox in self._inboxes:
                    self._look(inbox)
                stop.wait(self._settings.poll_s)
        finally:
            if source is not None:
                source.stop()
            self._end()

    def _open_source(self) -> Any:
        """Other programs' samples over a broker on this device, where the settings name topics."""
        if not self._settings.mqtt_topics or not self._inboxes:
            return None
        from fl_clients.edge.samples.topics import open_source

        try:
            source = open_source(self._settings, self.inboxes, self._home)
        except (OSError, UnicodeDecodeError) as error:
            LOG.error("samples: no samples over MQTT: %s", error)
            return None
        source.start()
        return source

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Application -> see SampleIndex.summary; without one whose index cannot be read."""
        found = {}
        for inbox in self._inboxes:
            try:
                index = SampleIndex(inbox.store)
                try:
                    found[inbox.application] = index.summary()
                finally:
                    index.close()
            except (FieldfleetError, sqlite3.Error, OSError) as error:  # a damaged index must not silence the device
                LOG.warning("samples of %s: %s", inbox.application, error)
        return found

    def _look(self, inbox: _Inbox) -> None:
        now, process = time.monotonic(), inbox.process
        if process is not None:
            if process.poll() is None:
                return
            inbox.process = None
            if process.returncode == 0:
                inbox.backoff.reset()
                self._tell(inbox)
            else:
                LOG.warning("samples of %s: the intake ended with %d", inbox.application, process.returncode)
                inbox.not_before = now + inbox.backoff.next()
        if now < inbox.not_before or not (_something(inbox.folder) or now - inbox.last_run > EXPIRE_EVERY_S):
            return
        inbox.last_run = now
        command = [sys.executable, "-m", "fl_clients.edge.samples.intake", "--application", inbox.application]
        command += ["--store", str(inbox.store), "--inbox", str(inbox.folder), "--settle", str(self._settings.settle_s)]
        try:
            inbox.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as error:
            LOG.warning("samples of %s: the intake could not be started: %s", inbox.application, error)
            inbox.not_before = now + inbox.backoff.next()

    def _tell(self, inbox: _Inbox) -> None:
        added = self.summaries().get(inbox.application, {}).get("added", inbox.added)
        if added > inbox.added:
            inbox.added = added
            self._changed(inbox.application)

    def _end(self) -> None:
        running = [inbox.process for inbox in self._inboxes if inbox.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def limits_of(settings: SampleSettings) -> Limits:
    return Limits(
        max_bytes=int(settings.max_mb * 2**20), max_samples=settings.max_samples, max_age_s=settings.max_days * 86_400.0
    )


def places(home: AgentHome, settings: AgentSettings) -> Mapping[str, tuple[Path, Path]]:
    """Application -> (store, inbox). A named inbox holds one folder for each application where there are several."""
    found, names = {}, settings.device.names
    for name in names:
        store = home.application(name).samples
        inbox = store / "inbox"
        if settings.samples.inbox:
            common = home.folder / Path(settings.samples.inbox).expanduser()
            inbox = common if len(names) == 1 else common / name
        found[name] = (store, inbox)
    return found


def _something(folder: Path) -> bool:
    """Whether a file lies there that is not still being written, by its name."""
    try:
        with os.scandir(folder) as entries:
            return any(
                not entry.name.startswith(".") and not entry.name.endswith((".tmp", ".part")) and not entry.is_dir()
                for entry in entries
            )
    except OSError as error:
        LOG.warning("samples: %s", error)
        return False
