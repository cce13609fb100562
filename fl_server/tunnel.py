"""The server's end of all tunnels: packets from devices become requests to the endpoint, in its own event loop.

One session a device, no thread for any of them. Who is at the other end is proved by the handshake, and what they may
do is decided by the endpoint at each request, as over HTTPS: a revoked device is refused at its next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.serialization import Encoding
from starlette.types import ASGIApp, Scope

from fl_core.contracts.errors import IntegrityError
from fl_core.identity import ca
from fl_core.identity.keys import PrivateKey, load_private_key
from fl_core.link import session as mqtt
from fl_core.link import topics
from fl_core.link.tunnel import packets
from fl_core.link.tunnel.channel import WINDOW
from fl_core.link.tunnel.handshake import Place, ServerHandshake
from fl_core.link.tunnel.packets import Kind, Packet, read_packet
from fl_core.link.tunnel.streams import Stream
from fl_server.tunnel_session import Session

LOG = logging.getLogger(__name__)
DEVICE_SCOPE, KEY_SCOPE = "fieldfleet.device", "fieldfleet.key"  # what the endpoint finds in a request's scope
RESUME_S = 1_200.0  # longer than the longest poll: a device that was cut off in the middle of a request may come back for so long
FORGET_S = 25 * 3600.0
SWEEP_S = 30.0
HINT_S = 1.0  # between two hints to one device that its session is unknown
EARLY_LIMIT = WINDOW
PACKETS_IN_FLIGHT = 2_048  # of all devices: about 120 MB
EXPIRY_S = 120
COUNT_S = 0.1
HELLO_S = 0.2  # between two handshakes that one device begins


class Carrier(Protocol):
    """What brings packets to devices: the server's session with its broker, or the embedded broker itself."""

    @property
    def connected(self) -> bool: ...

    @property
    def largest_packet(self) -> int: ...

    def publish(self, message: mqtt.Outgoing, then: Callable[[bool], None] | None = None) -> object | None:
        """then(taken) is called once, on any thread; None, and no call, when there is no connection."""
        ...


class TunnelServer:
    """tap() takes packets from any thread. start(loop) before, stop() after."""

    def __init__(self, app: ASGIApp, *, fleet: str, certificate: Path, key: Path) -> None:
        self._app, self.fleet = app, fleet
        self.renew(certificate, key)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mqtt: Carrier | None = None
        self.sessions: dict[str, Session] = {}
        self._pending: dict[str, Pending] = {}
        self._hinted: dict[str, float] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.handshakes = 0  # that were proved
        self._window, self._counted_at = WINDOW, float("-inf")

    def renew(self, certificate: Path, key: Path) -> None:
        """For handshakes that begin from now on; from any thread."""
        der = ca.load_certificate(certificate).public_bytes(Encoding.DER)
        self._identity: tuple[bytes, PrivateKey] = (der, load_private_key(key))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.call_soon_threadsafe(self._begin)

    def attach(self, carrier: Carrier) -> None:
        self._mqtt = carrier

    def stop(self, timeout: float = 5.0) -> None:
        """From another thread than the loop's: every request under way ends."""
        self._stopping = True
        if self._loop is None or not self._loop.is_running():
            return
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result(timeout)

    def tap(self, message: mqtt.Message) -> bool:
        """For MqttSession: takes what comes through tunnels."""
        found = topics.parse(message.topic)
        if found is None or found.kind != topics.UP:
            return False
        if self._loop is not None and not self._stopping and not message.retained and found.fleet == self.fleet:
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                self._loop.call_soon_threadsafe(self._take, found.device, message.payload)
        return True

    def link_changed(self) -> None:
        """The connection to the broker came or went; from any thread."""
        if self._loop is not None and not self._stopping:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._came_up)

    # in the loop

    @property
    def connected(self) -> bool:
        return self._mqtt is not None and self._mqtt.connected

    def window(self) -> int:
        """Packets in flight for each device: all together stay below a bound however many there are."""
        now = time.monotonic()
        if now >= self._counted_at + COUNT_S:
            busy = sum(1 for session in self.sessions.values() if session.end.channel.in_flight)
            self._window, self._counted_at = max(2, min(WINDOW, PACKETS_IN_FLIGHT // max(1, busy))), now
        return self._window

    def largest_packet(self) -> int:
        return self._mqtt.largest_packet if self._mqtt is not None else packets.PACKET_LIMIT

    def publish(self, device: str, packet: bytes, then: Callable[[bool], None] | None = None) -> None:
        message = mqtt.Outgoing(topic=topics.topic(self.fleet, device, topics.DOWN), payload=packet, expiry_s=EXPIRY_S)
        try:
            sent = self._mqtt.publish(message, then) if self._mqtt is not None else None
        except IntegrityError as error:
            LOG.error("tunnel: %s: %s", device, error.message)
            sent = None
        if sent is None and then is not None:
            then(False)

    def shut_out(self, devices: Iterable[str]) -> None:
        """End the sessions of devices that were revoked; from any thread. What they had under way ends with them."""
        for device in devices:
            self.call(self._shut_out, device)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """In the loop, from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *arguments)

    def spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def request(self, device: str, pem: bytes, stream: Stream) -> Scope:
        """The ASGI scope of a request. Raises IntegrityError for a head that is none."""
        texts = [part.decode("latin-1") for part in stream.head]
        if len(texts) < 2 or len(texts) % 2 or not texts[1].startswith("/"):
            raise IntegrityError("tunnel: a request without method and path")
        path, _, query = texts[1].partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": texts[0],
            "scheme": "https",
            "path": urllib.parse.unquote(path),
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in zip(texts[2::2], texts[3::2], strict=True)
            ],
            "client": (device, 0),
            "server": None,
            DEVICE_SCOPE: device,
            KEY_SCOPE: pem,
        }

    async def serve(self, scope: Scope, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    # inside

    def _begin(self) -> None:
        self._sweeper = asyncio.ensure_future(self._sweep())

    def _shut_out(self, device: str) -> None:
        if (session := self.sessions.pop(device, None)) is not None:
            session.close("this device was shut out")

    async def _end_all(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for session in list(self.sessions.values()):
            session.close("the server is stopping")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for device, session in list(self.sessions.items()):
                silent = now - session.heard_at
                busy = bool(session.end.streams.open_streams or session.end.channel.in_flight)
                if silent > (RESUME_S if busy else FORGET_S):
                    session.close("the device has not been heard of")
                    del self.sessions[device]
            for table in (self._pending, self._hinted):
                for device in [d for d, item in table.items() if now - _made(item) > RESUME_S]:
                    del table[device]

    def _take(self, device: str, data: bytes) -> None:
        try:
            packet = read_packet(data, origin=f"tunnel of {device}")
            if packet.kind == Kind.HELLO:
                self._hello(device, packet)
            elif packet.kind == Kind.FINISH:
                self._finish(device, packet)
            elif packet.kind in (Kind.DATA, Kind.ACK):
                self._packet(device, packet)
        except IntegrityError as error:
            LOG.debug("tunnel: %s: %s", device, error.message)

    def _hello(self, device: str, packet: Packet) -> None:
        pending, established = self._pending.get(device), self.sessions.get(device)
        if established is not None and established.end.channel.session == packet.session:
            return
        if pending is None or pending.handshake.session != packet.session or pending.handshake.hello != packet.body:
            if pending is not None and time.monotonic() - pending.made_at < HELLO_S:
                return  # it is repeated
            handshake = ServerHandshake(Place(self.fleet, device), packet, *self._identity)
            pending = self._pending[device] = Pending(handshake)
        self.publish(device, pending.handshake.answer)

    def _finish(self, device: str, packet: Packet) -> None:
        pending, established = self._pending.get(device), self.sessions.get(device)
        if established is not None and established.end.channel.session == packet.session:
            established.end.channel.link_up(time.monotonic())  # it has not heard of us yet
            established.pump()
        elif pending is None or pending.handshake.session != packet.session:
            self._hint(device, packet.session)
        elif not pending.proving:
            pending.proving = True
            self.spawn(self._prove(device, pending, packet))

    async def _prove(self, device: str, pending: Pending, packet: Packet) -> None:
        """Checking a P-384 signature takes a millisecond: in a thread, while others are served."""
        try:
            pem, keys = await asyncio.to_thread(pending.handshake.finish, packet)
        except IntegrityError as error:
            LOG.warning("tunnel: %s: %s", device, error.message)
            pending.proving = False
            return
        if self._pending.get(device) is not pending or self._stopping:
            return
        del self._pending[device]
        if (former := self.sessions.get(device)) is not None:
            former.close("the device began a new session")
        self.handshakes += 1
        session = self.sessions[device] = Session(self, device, pem, pending.handshake.session, keys)
        session.end.channel.link_up(time.monotonic())  # its acknowledgement tells the device that all is well
        for early in pending.early:
            session.take(early)
        session.pump()

    def _packet(self, device: str, packet: Packet) -> None:
        session, pending = self.sessions.get(device), self._pending.get(device)
        if session is not None and session.end.channel.session == packet.session:
            session.take(packet)
            if session.closed:
                del self.sessions[device]
        elif pending is not None and pending.handshake.session == packet.session:
            if pending.proving and len(pending.early) < EARLY_LIMIT:
                pending.early.append(packet)
        else:
            self._hint(device, packet.session)

    def _hint(self, device: str, session: bytes) -> None:
        now = time.monotonic()
        if now - self._hinted.get(device, -HINT_S) >= HINT_S:
            self._hinted[device] = now
            self.publish(device, packets.header(Kind.UNKNOWN, session))

    def _came_up(self) -> None:
        if self.connected:
            now = time.monotonic()
            for session in self.sessions.values():
                if session.end.streams.open_streams or session.end.channel.in_flight:
                    session.end.channel.link_up(now)
                    session.pump()


class Pending:
    """A handshake that waits for the device's proof; ``early``: what came while the proof was checked."""

    def __init__(self, handshake: ServerHandshake) -> None:
        self.handshake, self.made_at = handshake, time.monotonic()
        self.proving = False
        self.early: list[Packet] = []


def _made(item: Pending | float) -> float:
    return item if isinstance(item, float) else item.made_at
