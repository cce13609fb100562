"""Makes changes of the registry take effect at once in a running server, whichever process made them.

A command that changed something rings (through the control socket); should that ring be lost, a look every few seconds
finds the change. A device that may not take part any more loses its long poll, its place in the round and its session
at the broker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fl_core.flower.adapter import LinkStore
from fl_server.bell import Bell
from fl_server.directory import Directory
from fl_server.registry import Registry

log = logging.getLogger(__name__)
LOOK_S, FLUSH_S = 5.0, 60.0


class FleetWatch:
    """A service: start() ... stop(). on_shut_out listeners get the names of devices that were shut out."""

    def __init__(self, registry: Registry, directory: Directory, store: LinkStore, bell: Bell) -> None:
        self._registry, self._directory, self._store, self._bell = registry, directory, store, bell
        self._listeners: list[Callable[[list[str]], None]] = []
        self._ring, self._stopping = threading.Event(), threading.Event()
        self._shut: dict[int, str] = {}
        self._thread = threading.Thread(target=self._run, name="fleet-watch", daemon=True)

    def on_shut_out(self, listener: Callable[[list[str]], None]) -> None:
        self._listeners.append(listener)

    def start(self) -> None:
        self._shut = self._directory.shut_out()
        self._thread.start()

    def look(self) -> None:
        """Something may have changed; from any thread."""
        self._ring.set()

    def asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """For the control socket."""
        self.look()
        return {}

    def stop(self) -> None:
        self._stopping.set()
        self._ring.set()
        if self._thread.is_alive():
            self._thread.join(10.0)
        self._directory.flush_seen()

    def _run(self) -> None:
        version, flushed = -1, time.monotonic()
        while not self._stopping.is_set():
            rung = self._ring.wait(LOOK_S)
            self._ring.clear()
            try:
                found = self._registry.version()
                if rung or found != version:
                    version = found
                    self._apply()
                if time.monotonic() - flushed > FLUSH_S:
                    flushed = time.monotonic()
                    self._directory.flush_seen()
            except Exception:  # a full disk, say: the next look may do better
                log.exception("watching the registry")

    def _apply(self) -> None:
        before, self._shut = self._shut, self._directory.shut_out()
        fresh = {node: name for node, name in self._shut.items() if before.get(node) is None}
        if fresh:
            for node in fresh:
                self._store.deactivate(node)
            self._bell.ring_devices(fresh)  # their long polls end, and are refused
            names = sorted(name for name in fresh.values() if name)
            if names:
                log.info("shut out: %s", ", ".join(names), extra={"facts": {"devices": names}})
            for listener in self._listeners:
                listener(names)
        self._bell.ring_engine()
