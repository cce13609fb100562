"""One device's established tunnel on the server: its streams become requests to the endpoint, their answers streams."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Message, Scope

from fl_core.contracts.errors import IntegrityError
from fl_core.link.tunnel.end import End, Violation
from fl_core.link.tunnel.handshake import Keys
from fl_core.link.tunnel.packets import Packet
from fl_core.link.tunnel.streams import Stream

LOG = logging.getLogger(__name__)
READ = 256 << 10


class Host(Protocol):
    """What a session needs of the server around it (TunnelServer)."""

    @property
    def connected(self) -> bool: ...

    def window(self) -> int: ...

    def largest_packet(self) -> int: ...

    def publish(self, device: str, packet: bytes, then: Callable[[bool], None] | None = None) -> None: ...

    def call(self, function: Callable[..., None], *arguments: Any) -> None: ...

    def spawn(self, work: Any) -> asyncio.Task[None]: ...

    def request(self, device: str, pem: bytes, stream: Stream) -> Scope: ...

    async def serve(self, scope: Scope, receive: Any, send: Any) -> None: ...


class Session:
    """One established tunnel."""

    def __init__(self, server: Host, device: str, pem: bytes, session: bytes, keys: Keys) -> None:
        self._server, self.device, self._pem = server, device, pem
        self.end = End(session, keys, server=True, changed=self._changed)
        self.heard_at = time.monotonic()
        self.closed = False
        self._requests: dict[Stream, Request] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False

    def take(self, packet: Packet) -> None:
        now = time.monotonic()
        try:
            opened = self.end.take(packet, now)
        except Violation as error:
            LOG.warning("tunnel: %s: %s", self.device, error)
            self.close(str(error))
            return
        self.heard_at = now
        for stream in opened:
            request = self._requests[stream] = Request(self, stream)
            self._server.spawn(self._serve(request))
        self.pump_soon()

    def pump_soon(self) -> None:
        """Once for everything that happens in this turn of the loop: one packet instead of several."""
        if not self._pumping and not self.closed:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        self._pumping = False
        if self.closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._server.connected:
            return
        now = time.monotonic()
        channel = self.end.channel
        channel.window = self._server.window()
        self.end.bound(self._server.largest_packet())
        for number, packet in self.end.outgoing(now):
            self._server.publish(self.device, packet, None if number is None else self._noting(number))
        deadline = channel.deadline()
        if deadline != float("inf"):
            self._timer = asyncio.get_running_loop().call_later(max(0.001, deadline - now), self.pump)

    def close(self, reason: str) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.end.streams.abandon(reason)
        for request in self._requests.values():
            request.news.set()

    # inside

    def _noting(self, number: int) -> Callable[[bool], None]:
        return lambda ok: self._server.call(self._taken, number, ok)

    def _taken(self, number: int, ok: bool) -> None:
        self.end.channel.taken(number, time.monotonic(), lost=not ok)
        self.pump_soon()

    def _changed(self, stream: Stream) -> None:
        if (request := self._requests.get(stream)) is not None:
            request.news.set()

    async def _serve(self, request: Request) -> None:
        try:
            scope = self._server.request(self.device, self._pem, request.stream)
            await self._server.serve(scope, request.receive, request.send)
        except (IntegrityError, UnicodeError, OSError) as error:
            LOG.debug("tunnel: %s: %s", self.device, error)
        except Exception:  # the endpoint's own fault: this request fails, the others go on
            LOG.exception("tunnel: %s: a request failed", self.device)
        finally:
            if not request.stream.ended_out and not request.stream.reason:
                self.end.streams.reset(request.stream, "the server could not answer")
            self._requests.pop(request.stream, None)
            self.pump_soon()


class Request:
    """One request as the endpoint sees it (ASGI)."""

    def __init__(self, session: Session, stream: Stream) -> None:
        self._session, self.stream = session, stream
        self.news = asyncio.Event()
        self._whole = False  # the body was handed over to its end

    async def receive(self) -> Message:
        stream, streams = self.stream, self._session.end.streams
        while not stream.reason:
            if stream.incoming or (stream.ended_in and not self._whole):
                data = streams.read(stream, READ)
                self._whole = stream.ended_in and not stream.incoming
                self._session.pump_soon()
                return {"type": "http.request", "body": data, "more_body": not self._whole}
            if not stream.reading:
                streams.read(stream, 0)  # from here on there is a reader: full credit
                self._session.pump_soon()
            await self._wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Raises OSError when the device is gone, as servers do."""
        stream, streams = self.stream, self._session.end.streams
        if stream.reason:
            raise OSError(stream.reason)
        if message["type"] == "http.response.start":
            parts = [str(message["status"]).encode(), *(part for pair in message.get("headers", ()) for part in pair)]
            streams.answer(stream, parts)
        elif message["type"] == "http.response.body":
            streams.write(stream, message.get("body", b""))
            if not message.get("more_body", False):
                streams.end(stream)
            self._session.pump_soon()
            while not stream.room and not stream.reason:
                await self._wait()

    async def _wait(self) -> None:
        self.news.clear()
        await self.news.wait()
