"""The Transport that looks for a way: HTTPS, and through the broker for a while where HTTPS does not get through."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from fl_clients.broker_connection import BrokerConnection
from fl_clients.connection import Response, ServerConnection, Transport, Unreachable
from fl_clients.tunnel import TunnelClient
from fl_core.identity.signature import HeaderSigner

AGAIN_S = 600.0  # until HTTPS is tried again


class AutoConnection(Transport):
    """Requests of one thread, like those it chooses from. What one finds out counts for all that share the tunnel."""

    def __init__(
        self,
        direct: ServerConnection,
        broker: BrokerConnection,
        tunnel: TunnelClient,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._direct, self._broker, self._tunnel, self._clock = direct, broker, tunnel, clock

    @property
    def url(self) -> str:
        return self._broker.url if self._through_broker() else self._direct.url

    @property
    def signer(self) -> HeaderSigner:
        return self._direct.signer

    @contextlib.contextmanager
    def stream(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[Response]:
        """A request that HTTPS did not take goes through the broker at once where its body is still whole."""
        if not self._through_broker():
            answered = False
            try:
                with self._direct.stream(method, path, body, timeout=timeout, headers=headers) as response:
                    answered = True
                    yield response
                    return
            except Unreachable:
                if answered or not self._tunnel.attached:
                    raise
                self._tunnel.preferred_until = self._clock() + AGAIN_S
                if not isinstance(body, bytes):
                    raise
        try:
            with self._broker.stream(method, path, body, timeout=timeout, headers=headers) as response:
                yield response
        except Unreachable:
            self._tunnel.preferred_until = float("-inf")
            raise

    def interrupt(self) -> None:
        self._direct.interrupt()
        self._broker.interrupt()

    def close(self) -> None:
        self._direct.close()
        self._broker.close()

    def _through_broker(self) -> bool:
        return self._clock() < self._tunnel.preferred_until and self._tunnel.attached
