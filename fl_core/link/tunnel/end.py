"""End: one side of an established session, channel and streams together. Bytes in, bytes out, no I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable

from fl_core.contracts.errors import IntegrityError
from fl_core.link.tunnel.channel import SEAL_BYTES, Channel
from fl_core.link.tunnel.handshake import Keys
from fl_core.link.tunnel.packets import HEADER_BYTES, PAYLOAD_LIMIT, Packet
from fl_core.link.tunnel.streams import Stream, Streams

MQTT_BYTES = 512  # a topic and MQTT's own headers, at most


class Violation(Exception):
    """The other side, and nobody else, broke the protocol."""


class End:
    """``changed(stream)`` is called when a stream has news for its reader or writer."""

    def __init__(
        self, session: bytes, keys: Keys, *, server: bool, changed: Callable[[Stream], None] = lambda stream: None
    ) -> None:
        self.channel, self.streams = Channel(session, keys), Streams(server=server, changed=changed)
        self._limit = PAYLOAD_LIMIT

    def bound(self, largest_packet: int) -> None:
        """The broker's limit for one MQTT packet."""
        self._limit = max(1024, min(PAYLOAD_LIMIT, largest_packet - HEADER_BYTES - SEAL_BYTES - MQTT_BYTES))

    def take(self, packet: Packet, now: float) -> list[Stream]:
        """Returns the streams that were opened by it.

        Raises IntegrityError for a packet that counts for nothing, Violation when the session must end.
        """
        payloads = self.channel.receive(packet, now)
        try:
            return [stream for payload in payloads for stream in self.streams.take(payload)]
        except IntegrityError as error:
            raise Violation(error.message) from None

    def outgoing(self, now: float) -> list[tuple[int | None, bytes]]:
        """See Channel.outgoing."""
        self.channel.expire(now)
        return self.channel.outgoing(now, lambda: self.streams.next_payload(self._limit))
