"""The device's end of the tunnel: one session with the server over the agent's connection to the broker.

Paho's callbacks, the threads that ask, and the tunnel's own thread meet in a queue of events; only that thread
publishes, and never while it holds the lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_clients.connection import CertificateRefused, Unreachable
from fl_core.contracts.errors import IntegrityError
from fl_core.identity.keys import PrivateKey
from fl_core.link import topics
from fl_core.link.session import Message, MqttSession, Outgoing
from fl_core.link.tunnel.end import End, Violation
from fl_core.link.tunnel.handshake import DeviceHandshake, Place, UntrustedServer, authorities
from fl_core.link.tunnel.packets import Kind, Packet, read_packet
from fl_core.link.tunnel.streams import Stream

LOG = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # for an answer to HELLO and to FINISH
DEAD_S = 90.0  # without a sign of the server, while something waits for its acknowledgement
RENEW_S = 24 * 3600.0  # fresh keys at least as often
EXPIRY_S = 120
AT_ONCE = 64
JOIN_S = 5.0


@dataclass(frozen=True)
class Taken:
    """The broker took a packet of this session, or it was lost on the way."""

    end: End
    number: int
    ok: bool


@dataclass
class Shaking:
    """A handshake under way: HELLO, and then (``proving``) FINISH, repeated until it is answered."""

    handshake: DeviceHandshake
    packet: bytes
    proving: bool = False
    again_at: float = 0.0
    wait: float = FIRST_WAIT_S

    def due(self, now: float) -> bool:
        if now < self.again_at:
            return False
        self.again_at, self.wait = now + self.wait, min(2 * self.wait, LONGEST_WAIT_S)
        return True


class TunnelClient:
    """attach() to a session, open() streams from any thread, close(). ``tap`` is the session's."""

    def __init__(self, key: PrivateKey, ca: Path) -> None:
        self._key, self._authorities = key, authorities(ca)
        self._events: queue.SimpleQueue[bytes | Taken | str] = queue.SimpleQueue()
        self.changed = threading.Condition()
        self._session: MqttSession | None = None
        self._place = Place("", "")
        self._down = ""
        self._shaking: Shaking | None = None
        self._end: End | None = None
        self._confirmed, self._made_at, self._heard_at = False, 0.0, 0.0
        self._wanted = 0  # threads that wait for a session
        self._refusal = ""
        self._was_up = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self.handshakes = 0
        self.preferred_until = float("-inf")  # of time.monotonic(): HTTPS was found not to get through

    # for the owner of the session

    def attach(self, session: MqttSession | None, fleet: str, device: str) -> None:
        """Use this session from now on; what was under way over another one goes on only for the same device."""
        with self.changed:
            if Place(fleet, device) != self._place:
                self._forget("this device is another one now")
            self._place, self._session, self._was_up = Place(fleet, device), session, False
            self._down = topics.topic(fleet, device, topics.DOWN) if session is not None else ""
            if self._thread is None and session is not None:
                self._thread = threading.Thread(target=self._run, name="tunnel", daemon=True)
                self._thread.start()
        self.poke()

    def tap(self, message: Message) -> bool:
        """For MqttSession: takes what comes through the tunnel."""
        if message.topic != self._down:
            return False
        if not message.retained:
            self._events.put(message.payload)
        return True

    def poke(self) -> None:
        """Look again: the connection came or went, or there is something to send."""
        self._events.put("poke")

    def close(self) -> None:
        with self.changed:
            self._closing = True
            self._forget("the agent is ending")
        self.poke()
        if self._thread is not None:
            self._thread.join(JOIN_S)

    # for those who ask

    @property
    def attached(self) -> bool:
        return self._session is not None

    @property
    def quiet(self) -> bool:
        """A session stands, and nothing waits for an acknowledgement."""
        end = self._end
        return end is not None and not end.channel.in_flight

    @property
    def address(self) -> str:
        session = self._session
        return f"mqtt://{session.address.host}:{session.address.port}" if session is not None else "mqtt://-"

    def open(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        timeout: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[End, Stream]:
        """A new request. Raises Unreachable, or CertificateRefused when somebody else answered in the server's place."""
        head = [part.encode() for part in (method, path, *(x for pair in headers.items() for x in pair))]
        with self.changed:
            if self._end is not None and self._outlived(time.monotonic()):
                self._forget("fresh keys")
            self._wanted += 1
            self.poke()
            self.changed.wait_for(lambda: self._end is not None or self._closing or cancelled(), timeout)
            self._wanted -= 1
            if self._end is None:
                raise self._failure()
            end = self._end
            stream = end.streams.open(head)
        self.poke()
        return end, stream

    def wait(self, condition: Callable[[], object], timeout: float) -> bool:
        """Until the condition holds; it is looked at whenever something has arrived or left."""
        with self.changed:
            return bool(self.changed.wait_for(condition, timeout))

    def read(self, end: End, stream: Stream, amount: int) -> bytes:
        """What is there now."""
        with self.changed:
            data = end.streams.read(stream, amount)
            credit = end.streams.speaks
        if credit:
            self.poke()
        return data

    def reset(self, end: End, stream: Stream, reason: str) -> None:
        with self.changed:
            end.streams.reset(stream, reason)
            self.changed.notify_all()
        self.poke()

    # the thread

    def _run(self) -> None:
        while not self._closing:
            try:
                event: bytes | Taken | str = self._events.get(timeout=self._pause())
            except queue.Empty:
                event = "time"
            try:
                with self.changed:
                    self._handle_all(event)
                    due = self._due(time.monotonic())
                    self.changed.notify_all()
                self._publish(due)
            except Exception:
                LOG.exception("tunnel")

    def _handle_all(self, event: bytes | Taken | str) -> None:
        now = time.monotonic()
        for _ in range(AT_ONCE):
            if isinstance(event, bytes):
                self._take(event, now)
            elif isinstance(event, Taken) and event.end is self._end:
                event.end.channel.taken(event.number, now, lost=not event.ok)
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
        if isinstance(event, bytes):
            self._take(event, now)

    def _take(self, data: bytes, now: float) -> None:
        try:
            packet = read_packet(data, origin=self._down)
            if packet.kind == Kind.SERVER_HELLO:
                self._finish(packet, now)
            elif self._end is None or packet.session != self._end.channel.session:
                return
            elif packet.kind == Kind.UNKNOWN:
                self._start(now)
            elif packet.kind in (Kind.DATA, Kind.ACK):
                self._end.take(packet, now)
                self._confirmed, self._heard_at = True, now
        except UntrustedServer as error:
            self._refusal = error.message
            LOG.warning("tunnel: %s", error.message)
        except IntegrityError as error:
            LOG.debug("tunnel: %s", error.message)
        except Violation as error:
            LOG.warning("tunnel: %s", error)
            self._forget(str(error))

    def _start(self, now: float) -> None:
        shaking = self._shaking
        if shaking is not None and not shaking.proving:
            return  # HELLO is repeated as it is
        if shaking is not None and self._end is not None and now < shaking.again_at:
            return
        handshake = DeviceHandshake(self._place, self._key, self._authorities)
        self._shaking = Shaking(handshake, handshake.hello())

    def _finish(self, answer: Packet, now: float) -> None:
        shaking = self._shaking
        if shaking is None or answer.session != shaking.handshake.session:
            return
        if self._end is not None and self._end.channel.session == answer.session:
            return  # an answer that came twice
        packet, keys = shaking.handshake.finish(answer)
        self._forget("the server began a new session")
        self._end = End(answer.session, keys, server=False)
        if self._session is not None:
            self._end.bound(self._session.largest_packet)
        self._shaking = Shaking(shaking.handshake, packet, proving=True)
        self._confirmed, self._made_at, self._heard_at, self._refusal = False, now, now, ""
        self.handshakes += 1

    def _due(self, now: float) -> list[tuple[End | None, int | None, bytes]]:
        """What to publish now, in order; nothing while there is no connection."""
        session = self._session
        up = session is not None and session.connected
        if up and not self._was_up:
            self._came_up(now)
        self._was_up = up
        if not up:
            return []
        end = self._end
        if end is not None and not end.channel.in_flight:
            self._heard_at = now  # nothing is waited for
        elif end is not None and now - self._heard_at > DEAD_S:
            self._forget("the server has not answered for a long time")
            end = None
        if end is None and self._wanted:
            self._start(now)
        due: list[tuple[End | None, int | None, bytes]] = []
        shaking = self._shaking
        if shaking is not None and shaking.proving and (self._confirmed or end is None):
            shaking = self._shaking = None
        if shaking is not None and (shaking.proving or self._wanted or end is not None) and shaking.due(now):
            due.append((None, None, shaking.packet))
        if end is not None:
            due += [(end, number, packet) for number, packet in end.outgoing(now)]
        return due

    def _came_up(self, now: float) -> None:
        self._heard_at = now
        if self._shaking is not None:
            self._shaking.again_at, self._shaking.wait = 0.0, FIRST_WAIT_S
        if self._end is not None and (self._end.channel.in_flight or self._end.streams.open_streams):
            self._end.channel.link_up(now)

    def _publish(self, due: list[tuple[End | None, int | None, bytes]]) -> None:
        session = self._session
        if session is None:
            return
        topic = topics.topic(self._place.fleet, self._place.device, topics.UP)
        for end, number, packet in due:
            message, then = Outgoing(topic=topic, payload=packet, expiry_s=EXPIRY_S), None
            if end is not None and number is not None:
                then = self._noting(end, number)
            try:
                sent = session.publish(message, then)
            except IntegrityError as error:
                LOG.error("tunnel: %s", error.message)
                sent = None
            if sent is None and then is not None:
                then(False)

    def _noting(self, end: End, number: int) -> Callable[[bool], None]:
        return lambda ok: self._events.put(Taken(end, number, ok))

    def _pause(self) -> float | None:
        if self._session is None or not self._session.connected:
            return None
        repeated = self._shaking is not None and (self._shaking.proving or self._wanted or self._end is not None)
        times = [self._shaking.again_at] if self._shaking is not None and repeated else []
        if self._end is not None:
            times.append(self._end.channel.deadline())
            if self._end.channel.in_flight:
                times.append(self._heard_at + DEAD_S)
        wait = min(times, default=float("inf")) - time.monotonic()
        return None if wait == float("inf") else max(0.0, wait) + 0.001

    def _outlived(self, now: float) -> bool:
        assert self._end is not None
        return now - self._made_at > RENEW_S and not self._end.streams.open_streams

    def _forget(self, reason: str) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.streams.abandon(reason)
            self.changed.notify_all()

    def _failure(self) -> Exception:
        session = self._session
        if self._refusal:
            return CertificateRefused(
                f"{self.address}: {self._refusal}",
                remedy="check that ca.pem is this server's and that the device's clock is right",
            )
        if session is None:
            return Unreachable("no broker is known to this device yet")
        if not session.connected:
            return Unreachable(f"{self.address}: {session.failure or 'no connection to the broker'}")
        return Unreachable(f"{self.address}: the server does not answer through the broker")
