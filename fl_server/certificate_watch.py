"""Notices that ``fieldfleet server renew``, another process, has made a new certificate: connections made from then on get it."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from fl_core.contracts.errors import FieldfleetError
from fl_core.identity.ca import certificate_facts

log = logging.getLogger(__name__)
LOOK_S = 2.0
LOAD_S = 10.0


def reload_between_connections(
    context: ssl.SSLContext, certificate: Path, key: Path, loop: asyncio.AbstractEventLoop | None
) -> None:
    """For connections that begin from now on, in the thread of the ``loop`` that begins them (None: nothing does); from another thread.

    OpenSSL takes a new certificate and then its key: a handshake that began between the two would have no key and fail.
    """

    async def load() -> None:
        context.load_cert_chain(certificate, key)

    if loop is None or not loop.is_running():
        context.load_cert_chain(certificate, key)
    else:
        asyncio.run_coroutine_threadsafe(load(), loop).result(LOAD_S)


class CertificateWatch:
    """A service: start() ... stop(). Each of ``changed`` is called, on a thread of its own, once both files fit each other."""

    def __init__(
        self, certificate: Path, key: Path, changed: list[Callable[[], None]], *, look_s: float = LOOK_S
    ) -> None:
        self._files, self._changed, self._look_s = (certificate, key), changed, look_s
        self._stopping = threading.Event()
        self._last = self._stamp()
        self._thread = threading.Thread(target=self._run, name="certificate-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def _run(self) -> None:
        while not self._stopping.wait(self._look_s):
            found = self._stamp()
            if found == self._last:
                continue
            try:
                # Half of a renewal does not fit: tried on a context that nobody uses, and again at the next look.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files)
                for listener in self._changed:
                    listener()
                until = certificate_facts(self._files[0]).not_after
            except (OSError, FieldfleetError) as error:  # ssl.SSLError is an OSError
                log.warning("the renewed certificate is not used yet: %s", error)
                continue
            self._last = found
            log.info("using the renewed certificate, valid until %s", f"{until:%Y-%m-%d}")

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """Of both files; (0, 0) for one that is not there."""
        stamps = []
        for file in self._files:
            try:
                facts = file.stat()
                stamps.append((facts.st_ino, facts.st_mtime_ns))
            except OSError:
                stamps.append((0, 0))
        return tuple(stamps)
