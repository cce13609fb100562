"""The signed repository for the updater's own process, over whatever Transport the agent has: a door on loopback.

Read only, GET alone, below a path that nobody guesses. What passes needs no trust: the updater checks signatures.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import secrets
import threading
from collections.abc import Iterator
from typing import Any

from fl_clients.connection import Transport, Unreachable
from fl_core.contracts.errors import FieldfleetError

LOG = logging.getLogger(__name__)
PIECE = 64 << 10
TIMEOUT_S = 60.0
PASSED = ("content-length", "content-range", "accept-ranges")
UNAVAILABLE = 503


@contextlib.contextmanager
def repository_at(transport: Transport, path: str) -> Iterator[str]:
    """Where the updater finds the repository: at the server itself, or behind a door to the transport."""
    if transport.url.startswith("https://"):
        yield transport.url + path
    else:
        with repository_door(transport, path) as url:
            yield url


@contextlib.contextmanager
def repository_door(transport: Transport, path: str) -> Iterator[str]:
    """The URL under which the repository at ``path`` of the server can be read on this machine, while it is open."""
    prefix = f"/{secrets.token_urlsafe(16)}"

    class Door(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = TIMEOUT_S

        def do_GET(self) -> None:
            name = self.path.removeprefix(f"{prefix}/")
            if name == self.path:
                self.send_error(404)
                return
            byte_range = self.headers.get("range")
            try:
                self._pass_on(path.rstrip("/") + "/" + name, {"range": byte_range} if byte_range else {})
            except (Unreachable, FieldfleetError, OSError) as error:
                LOG.info("repository: %s", error)
                self.close_connection = True  # the answer is cut short, which the updater notices and resumes

        def _pass_on(self, wanted: str, headers: dict[str, str]) -> None:
            try:
                opened = transport.stream("GET", wanted, headers=headers, timeout=TIMEOUT_S)
                response = opened.__enter__()
            except (Unreachable, FieldfleetError):
                self.send_error(UNAVAILABLE)
                raise
            with contextlib.ExitStack() as stack:
                stack.push(opened)
                self.send_response(response.status)
                found = {name.lower(): value for name, value in response.getheaders()}
                for name in PASSED:
                    if name in found:
                        self.send_header(name, found[name])
                if "content-length" not in found:
                    self.send_header("content-length", "0")
                self.end_headers()
                while data := response.read1(PIECE):
                    self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            LOG.debug("repository: " + format, *args)

    with http.server.HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, name="repository-door", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{prefix}"
        finally:
            server.shutdown()
            thread.join()
