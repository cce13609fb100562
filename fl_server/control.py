"""The control socket: how commands on this machine talk to a server that runs. HOME/control.sock, mode 0600.

One JSON object a line in each direction, one request a connection. Who may open the socket may do everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import FieldfleetError, InputError, IntegrityError, RefusedError
from fl_server.home import ServerHome

log = logging.getLogger(__name__)
LIMIT = 4 << 20
ANSWER_S = 30.0
REQUEST_S = 10.0
NOT_RUNNING = "fieldfleet server start --home {home}"
Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


class ControlSocket:
    """A service: start() ... stop(). handlers: name of a request -> what answers it, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handlers: dict[str, Handler] = {}
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def on(self, name: str, handler: Handler) -> None:
        self._handlers[name] = handler

    def start(self) -> None:
        """The home's lock is held: a socket file that is there was left behind by a server that was killed."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with _short(self._path) as name:
                self._listener.bind(name)
        finally:
            os.umask(before)
        self._listener.listen(64)
        self._thread.start()

    def stop(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="control-request", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(REQUEST_S)
                request = _receive(connection)
                answer = self._answer(request)
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, IntegrityError) as error:
                log.debug("control: %s", error)

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            handler = self._handlers.get(str(request.get("do")))
            if handler is None:
                raise InputError(f"this server does not know the request {request.get('do')!r}")
            return {"ok": handler(request)}
        except FieldfleetError as error:
            return {"error": error.message, "remedy": error.remedy, "exit_code": int(error.exit_code)}
        except Exception as error:
            log.exception("control: %s", request.get("do"))
            return {"error": f"unexpected failure: {type(error).__name__}: {error}", "remedy": "", "exit_code": 1}


def ask(home: ServerHome, what: str, timeout: float | None = ANSWER_S, **fields: Any) -> dict[str, Any]:
    """Ask the server that runs from this home. Raises RefusedError when none does; its own errors otherwise."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            with _short(home.control_socket) as name:
                connection.connect(name)
            connection.sendall(json.dumps({"do": what, **fields}).encode() + b"\n")
            answer = _receive(connection)
        except TimeoutError:
            raise RefusedError(f"{home.path}: the server did not answer within {timeout:g} s") from None
        except (OSError, IntegrityError):
            raise RefusedError(
                f"{home.path}: no server runs from this home", remedy=NOT_RUNNING.format(home=home.path)
            ) from None
    if "error" in answer:
        raise _error(answer)
    return dict(answer["ok"])


def ring_fleet(home: ServerHome) -> None:
    """Tell a running server that the registry changed; without one there is nobody to tell."""
    with contextlib.suppress(RefusedError):
        ask(home, "fleet-changed")


def _error(answer: Mapping[str, Any]) -> FieldfleetError:
    code = answer.get("exit_code")
    kinds: list[type[FieldfleetError]] = [InputError, RefusedError, *FieldfleetError.__subclasses__()]
    kind = next((k for k in kinds if int(k.exit_code) == code), RefusedError)
    return kind(str(answer["error"]), remedy=str(answer.get("remedy", "")))


def _receive(connection: socket.socket) -> dict[str, Any]:
    """One line. Raises IntegrityError when it is too long, cut off or no JSON object."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = connection.recv(65_536)
        if not part or len(data) > LIMIT:
            raise IntegrityError("the control socket's line is too long or was cut off")
        data += part
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise IntegrityError("the control socket's line is not a JSON object")
    return table


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of at most 107 bytes for a socket, however deep its folder lies."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
