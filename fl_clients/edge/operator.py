"""The operator on the device itself: a socket in HOME that the running agent answers, and what is known without one.

``HOME/agent.sock`` (mode 0600) takes one line of JSON and gives one: {"do": "status"}, {"do": "enable-training"}.
``HOME/status.json`` is what the agent said last, for when it does not run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_clients.edge.home import AgentHome
from fl_core.contracts.errors import EnvironmentFault
from fl_core.storage import atomic

LOG = logging.getLogger(__name__)
LIMIT = 1 << 20
TIMEOUT_S = 10.0
WRITE_EVERY_S = 60.0  # a flash card wears out
SOCKET_NAME, FILE_NAME = "agent.sock", "status.json"
Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


class OperatorSocket:
    """start() ... stop(). Its thread answers one caller after the other; only the home's owner can call."""

    def __init__(self, home: AgentHome, handle: Handler) -> None:
        self._folder, self._handle = home.folder, handle
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="agent-operator", daemon=True)

    def start(self) -> None:
        """A home on a file system without sockets has none; that is no reason not to run."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            with _short(self._folder) as folder:
                (self._folder / SOCKET_NAME).unlink(missing_ok=True)  # of an agent that was killed; we hold the lock
                mask = os.umask(0o177)
                try:
                    listener.bind(f"{folder}/{SOCKET_NAME}")
                finally:
                    os.umask(mask)
            listener.listen(4)
        except OSError as error:
            LOG.warning("agent: no operator socket: %s", error)
            listener.close()
            return
        self._listener = listener
        self._thread.start()

    def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._thread.join(5.0)
        listener.close()
        (self._folder / SOCKET_NAME).unlink(missing_ok=True)

    def _run(self) -> None:
        while (listener := self._listener) is not None:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            with caller, contextlib.suppress(OSError):
                caller.settimeout(TIMEOUT_S)
                caller.sendall(json.dumps(self._answer(_line(caller))).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return self._handle(request if isinstance(request, dict) else {})
        except Exception as error:
            LOG.exception("agent: an operator's request failed")
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def ask(home: AgentHome, do: str) -> dict[str, Any] | None:
    """The running agent's answer; None where none runs. Raises EnvironmentFault when it does not answer."""
    caller = socket.socket(socket.AF_UNIX)
    with caller:
        caller.settimeout(TIMEOUT_S)
        try:
            with _short(home.folder) as folder:
                caller.connect(f"{folder}/{SOCKET_NAME}")
        except OSError:
            return None
        try:
            caller.sendall(json.dumps({"do": do}).encode() + b"\n")
            found = json.loads(_line(caller))
        except (OSError, ValueError) as error:
            raise EnvironmentFault(f"{home.folder}: the agent does not answer: {error}") from None
    return found if isinstance(found, dict) else None


class StatusFile:
    """What the agent said last. Written when something changed, at most once a minute, and at the end."""

    def __init__(self, home: AgentHome) -> None:
        self._path = home.folder / FILE_NAME
        self._due_at = 0.0

    def write(self, facts: Callable[[], Mapping[str, Any]], *, now: bool = False) -> None:
        if not now and time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + WRITE_EVERY_S
        with contextlib.suppress(OSError):  # a full disk is told by those who need it more
            atomic.write_json(self._path, {"time": time.time(), **facts()}, mode=0o600)

    def read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path.read_bytes()[:LIMIT])
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


def _line(caller: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < LIMIT and (part := caller.recv(65_536)):
        data += part
    return data


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A name for ``folder`` that fits into a socket's address, which holds 107 bytes."""
    if len(os.fsencode(folder)) < 90 or not Path("/proc/self/fd").is_dir():
        yield str(folder)
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)
