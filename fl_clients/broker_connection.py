"""The Transport over MQTT: the same requests, through the tunnel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from fl_clients.connection import Answer, Response, Transport, Unreachable
from fl_clients.tunnel import TunnelClient
from fl_core.contracts.errors import IntegrityError
from fl_core.identity.keys import PrivateKey
from fl_core.identity.signature import HeaderSigner
from fl_core.link.tunnel.end import End
from fl_core.link.tunnel.streams import Stream

OPEN_S = 15.0
PIECE = 256 << 10


class BrokerResponse:
    """An answer that arrives through the tunnel. ``timeout``: seconds without a byte."""

    def __init__(
        self, tunnel: TunnelClient, wait: Callable[[Callable[[], object]], None], end: End, stream: Stream
    ) -> None:
        self._tunnel, self._wait, self._end, self._stream = tunnel, wait, end, stream
        texts = [part.decode("latin-1") for part in stream.head]
        if not texts or not texts[0].isdigit() or len(texts) % 2 == 0:
            raise IntegrityError("tunnel: an answer without a status")
        self.status = int(texts[0])
        self._headers = list(zip(texts[1::2], texts[2::2], strict=True))

    def getheaders(self) -> list[tuple[str, str]]:
        return self._headers

    def read1(self, amount: int, /) -> bytes:
        """What is there, at least one byte; empty at the end. Raises Unreachable when the answer breaks off."""
        stream = self._stream
        self._wait(lambda: stream.incoming or stream.ended_in)
        return self._tunnel.read(self._end, stream, amount)

    def read(self, amount: int, /) -> bytes:
        parts, size = [], 0
        while size < amount and (part := self.read1(amount - size)):
            parts.append(part)
            size += len(part)
        return b"".join(parts)


class BrokerConnection(Transport):
    """Requests of one thread; ``interrupt`` may be called from any other. Many may share one tunnel."""

    def __init__(self, tunnel: TunnelClient, key: PrivateKey) -> None:
        self._signer = HeaderSigner(key)
        self._tunnel = tunnel
        self._current: tuple[End, Stream] | None = None
        self._interrupted = False

    @property
    def url(self) -> str:
        return self._tunnel.address

    @property
    def signer(self) -> HeaderSigner:
        return self._signer

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
        head = {"host": self.url.removeprefix("mqtt://"), **(headers or {})}
        if isinstance(body, bytes):
            head["content-length"] = str(len(body))
        self._interrupted = False
        opened = self._tunnel.open(method, path, head, min(timeout, OPEN_S), lambda: self._interrupted)
        end, stream = self._current = opened
        try:
            self._send(end, stream, [body] if isinstance(body, bytes) else body, timeout)
            self._wait(stream, lambda: stream.head, timeout)
            response = BrokerResponse(
                self._tunnel, lambda condition: self._wait(stream, condition, timeout), end, stream
            )
            if response.status >= 500 or response.status == 429:
                answer = Answer(response.status, response.read(65_536), {})
                raise Unreachable(f"{self.url}{path}: {answer.reason()}")
            yield response
        finally:
            self._current = None
            if not stream.finished:
                self._tunnel.reset(end, stream, "abandoned")

    def interrupt(self) -> None:
        self._interrupted = True
        with self._tunnel.changed:
            self._tunnel.changed.notify_all()
        current = self._current
        if current is not None:
            self._tunnel.reset(*current, "interrupted")

    def close(self) -> None:
        """The session belongs to the agent: nothing to let go of."""

    def _send(self, end: End, stream: Stream, parts: Iterable[bytes], timeout: float) -> None:
        for part in parts:
            for start in range(0, len(part), PIECE):
                if stream.head:  # the server has answered already: it does not want the rest
                    break
                with self._tunnel.changed:
                    end.streams.write(stream, part[start : start + PIECE] if len(part) > PIECE else part)
                self._tunnel.poke()
                self._wait(stream, lambda: stream.room or stream.head, timeout)
        with self._tunnel.changed:
            end.streams.end(stream)
        self._tunnel.poke()

    def _wait(self, stream: Stream, condition: Callable[[], object], timeout: float) -> None:
        """Raises Unreachable when the stream ends before, or nothing moves for ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self._tunnel.wait(lambda: condition() or stream.reason, deadline - time.monotonic())
        if not condition():
            raise Unreachable(f"{self.url}: {stream.reason or f'no answer within {timeout:.0f} s'}")
