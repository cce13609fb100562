"""A channel of sealed packets that arrive in order, each once, whatever a broker loses, repeats, swaps or invents.

DATA packet n carries ChaCha20-Poly1305(count of packets received, payload) with n as the nonce; sent again, it is the
same bytes. ACK packets have numbers of their own. Receiving is bounded by ``WINDOW`` packets in either direction.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fl_core.contracts.errors import IntegrityError
from fl_core.link.tunnel import packets
from fl_core.link.tunnel.handshake import Keys
from fl_core.link.tunnel.packets import Kind, Packet

WINDOW = 32  # packets of one direction that are not acknowledged
HANDED_LIMIT = 16  # of these, handed to the broker's connection and not taken by the broker
ACK_EVERY, ACK_DELAY_S = 8, 0.5
FIRST_WAIT_S, LONGEST_WAIT_S = 3.0, 30.0  # for an acknowledgement, counted from the broker's own
DUPLICATES = 3
SEAL_BYTES = 8 + 16  # the count and the tag
_COUNT = struct.Struct(">Q")
_ACK = struct.Struct(">QB")
_NONCE = struct.Struct(">IQ")
DATA_NONCE, ACK_NONCE, PROBE = 0, 1, 1
Source = Callable[[], bytes | None]  # the next payload, None when there is none now


@dataclass
class InFlight:
    """A packet that the other side has not acknowledged. handed: to the connection; taken: by the broker."""

    packet: bytes
    handed: bool = False
    taken: bool = False
    handed_at: float = 0.0


class Channel:
    """``now`` is in seconds of any monotonic clock. Every number of a received packet is checked before it is believed."""

    def __init__(self, session: bytes, keys: Keys) -> None:
        self.session, self.window = session, WINDOW
        self._seal, self._open = ChaCha20Poly1305(keys.send), ChaCha20Poly1305(keys.receive)
        self._sent = 0  # the number of the next new packet
        self._flying: dict[int, InFlight] = {}
        self._expected = 0
        self._early: dict[int, bytes] = {}
        self._acks_sent = self._acks_seen = 0
        self._unacknowledged, self._ack_at, self._probing = 0, math.inf, False
        self._duplicates, self._recovering = 0, False
        self._wait, self._progress = FIRST_WAIT_S, 0.0
        self.answered_at = -math.inf  # when the other side was last heard of
        self.repeated = 0  # packets sent again, for reports

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    # sending

    def outgoing(self, now: float, source: Source) -> list[tuple[int | None, bytes]]:
        """(number or None, packet) to publish now: what must be sent again, new payloads of ``source``, an ACK."""
        found: list[tuple[int | None, bytes]] = []
        handed = sum(1 for flight in self._flying.values() if flight.handed and not flight.taken)
        for number, flight in self._flying.items():
            if not flight.handed and handed < HANDED_LIMIT:
                found.append((number, flight.packet))
                flight.handed, flight.handed_at, handed = True, now, handed + 1
                self.repeated += 1
        while len(self._flying) < self.window and handed < HANDED_LIMIT and (payload := source()) is not None:
            found.append((self._sent, self._new(payload, now)))
            handed += 1
        if now >= self._ack_at:
            found.append((None, self._acknowledgement()))
        return found

    def taken(self, number: int, now: float, *, lost: bool) -> None:
        """The broker has (or, ``lost``, has perhaps not) taken a packet: only from then on is the other side slow."""
        flight = self._flying.get(number)
        if flight is None:
            return
        if lost:
            flight.handed = False
        elif flight.handed:
            flight.taken = True
            self._progress = max(self._progress, now)

    def link_up(self, now: float) -> None:
        """A new connection to the broker: ask what arrived, send the rest again."""
        for flight in self._flying.values():
            flight.handed = flight.taken = False
        self._wait, self._progress, self.answered_at = FIRST_WAIT_S, now, now
        self._probing, self._ack_at = True, now

    def expire(self, now: float) -> None:
        """Send the oldest packet again when its acknowledgement is overdue: the answer tells about the others."""
        for flight in self._flying.values():
            if flight.handed and not flight.taken and now >= flight.handed_at + LONGEST_WAIT_S:
                flight.taken = True  # a broker that says nothing
        if now >= self._progress + self._wait and any(flight.taken for flight in self._flying.values()):
            self._repeat(min(self._flying))
            self._recovering = True
            self._wait, self._progress = min(2 * self._wait, LONGEST_WAIT_S), now

    def deadline(self) -> float:
        """When ``outgoing`` or ``expire`` has something to do by itself; inf = never."""
        times = [self._ack_at]
        for flight in self._flying.values():
            if flight.handed:
                times.append(self._progress + self._wait if flight.taken else flight.handed_at + LONGEST_WAIT_S)
        return min(times)

    # receiving

    def receive(self, packet: Packet, now: float) -> list[bytes]:
        """The payloads that are next in order now. Raises IntegrityError for a packet that is not of the other side."""
        if packet.kind == Kind.ACK:
            self._take_ack(packet, now)
            return []
        number = packet.number
        if not self._expected <= number < self._expected + WINDOW or number in self._early:
            self._ack_at = min(self._ack_at, now + ACK_DELAY_S / 10)  # it seems not to know that we have it
            return []
        plain = self._opened(packet, DATA_NONCE)
        self.answered_at = now
        self._acknowledged(_COUNT.unpack_from(plain)[0], now)
        self._early[number] = plain[_COUNT.size :]
        ready = []
        while self._expected in self._early:
            ready.append(self._early.pop(self._expected))
            self._expected += 1
        self._unacknowledged += 1
        soon = self._unacknowledged >= ACK_EVERY or bool(self._early)
        self._ack_at = min(self._ack_at, now if soon else now + ACK_DELAY_S)
        return ready

    # inside

    def _new(self, payload: bytes, now: float) -> bytes:
        number, self._sent = self._sent, self._sent + 1
        head = packets.header(Kind.DATA, self.session, number)
        sealed = self._seal.encrypt(_NONCE.pack(DATA_NONCE, number), _COUNT.pack(self._expected) + payload, head)
        if not self._flying:
            self._progress = now
        self._flying[number] = InFlight(head + sealed, handed=True, handed_at=now)
        self._settled()
        return head + sealed

    def _acknowledgement(self) -> bytes:
        self._acks_sent += 1
        self._probing, probing = False, self._probing
        head = packets.header(Kind.ACK, self.session, self._acks_sent)
        plain = _ACK.pack(self._expected, PROBE if probing else 0)
        self._settled()
        return head + self._seal.encrypt(_NONCE.pack(ACK_NONCE, self._acks_sent), plain, head)

    def _settled(self) -> None:
        """The other side is about to be told what we have."""
        if not self._probing:
            self._unacknowledged, self._ack_at = 0, math.inf

    def _opened(self, packet: Packet, domain: int) -> bytes:
        try:
            plain = self._open.decrypt(_NONCE.pack(domain, packet.number), packet.body, packet.header)
        except InvalidTag:
            raise IntegrityError("tunnel: a packet is not from the other side") from None
        if len(plain) < (_ACK.size if domain == ACK_NONCE else _COUNT.size):
            raise IntegrityError("tunnel: a packet is too short")
        return plain

    def _take_ack(self, packet: Packet, now: float) -> None:
        plain = self._opened(packet, ACK_NONCE)
        if packet.number <= self._acks_seen:  # an old one again
            return
        self._acks_seen, self.answered_at = packet.number, now
        count, flags = _ACK.unpack_from(plain)
        before = len(self._flying)
        self._acknowledged(count, now)
        if flags & PROBE:
            self._repeat(*self._flying)
            self._ack_at = now
        elif self._flying and len(self._flying) == before:
            self._duplicates += 1
            if self._duplicates >= DUPLICATES:  # the oldest is missing there, others arrive
                self._duplicates = 0
                self._repeat(min(self._flying))

    def _acknowledged(self, count: int, now: float) -> None:
        if count > self._sent:
            raise IntegrityError("tunnel: packets are acknowledged that were never sent")
        done = [number for number in self._flying if number < count]
        for number in done:
            del self._flying[number]
        if done:
            self._wait, self._progress, self._duplicates = max(FIRST_WAIT_S, self._wait / 2), now, 0
            if self._recovering:  # what was sent with the packet that was lost is lost too, as a rule
                self._recovering = False
                self._repeat(*self._flying)

    def _repeat(self, *numbers: int) -> None:
        """What is still on its way to the broker is not sent a second time."""
        for number in numbers:
            flight = self._flying[number]
            if flight.taken:
                flight.handed = flight.taken = False
