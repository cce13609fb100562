"""Long-running parts of a server, started in order and stopped in reverse, whatever happens in between."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Protocol, Self

log = logging.getLogger(__name__)


class Service(Protocol):
    """start() returns when the service serves, or raises; stop() never raises for a service that is down already."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Services:
    """``with Services() as services: services.start(superlink); ...``"""

    def __init__(self) -> None:
        self._running: list[Service] = []

    def start(self, service: Service) -> None:
        service.start()
        self._running.append(service)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._running:
            service = self._running.pop()
            try:
                service.stop()
            except Exception:  # the others must still be stopped
                log.exception("stopping %s failed", type(service).__name__)
