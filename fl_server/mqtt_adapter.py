"""Every private name of amqtt 0.11.4 that this project uses, and what its broker needs before it may face a network.

amqtt as it comes waits for ever on the CONNECT of MQTT 5, deletes and overwrites a session before it has checked the password, hands each new client every
retained message that anyone subscribes to, publishes wills without asking its access rules, never ends a silent
connection, reads packets of up to 256 MB, stalls for 5 s when a client acknowledges quickly, and loses a message when
a subscription changes while its access plugin is awaited. ``GuardedBroker`` closes these; its tests fail when a new version moves one of the names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amqtt.adapters import BufferReader, ReaderAdapter, StreamReaderAdapter, StreamWriterAdapter, WriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.errors import MQTTError
from amqtt.mqtt.connack import NOT_AUTHORIZED, UNACCEPTABLE_PROTOCOL_VERSION, ConnackPacket
from amqtt.mqtt.packet import CONNECT, MQTTFixedHeader
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.publish import PublishPacket
from amqtt.session import Session

LOG = logging.getLogger(__name__)
CONNECT_S = 10.0
PACKET_LIMIT = 128 * 1024
PROTOCOL_LEVEL_AT = 6  # in the body of CONNECT, behind the length and the name "MQTT"
MQTT_311 = 4


class PacketTooLarge(Exception):
    """Ends the connection: skipping the packet would lose the place in the stream."""


class BoundedReader(ReaderAdapter):
    """Reads are refused above a size before any memory is taken."""

    def __init__(self, reader: ReaderAdapter) -> None:
        self._reader = reader

    async def read(self, n: int = -1) -> bytes:
        if n > PACKET_LIMIT:
            raise PacketTooLarge(f"a packet of {n:,} bytes")
        data: bytes = await self._reader.read(n)
        return data

    def feed_eof(self) -> None:
        self._reader.feed_eof()


async def _connect_packet(reader: ReaderAdapter) -> tuple[bytes, bytes]:
    """Fixed header and body of the whole CONNECT packet, so that parsing it cannot wait for more bytes."""
    header = await MQTTFixedHeader.from_stream(reader)
    if header is None or header.packet_type != CONNECT or header.remaining_length <= PROTOCOL_LEVEL_AT:
        raise MQTTError("the first packet is not CONNECT")
    body = await reader.read(header.remaining_length)
    if body[:6] != b"\x00\x04MQTT":
        raise MQTTError("not MQTT")
    return header.to_bytes(), body


Tap = Callable[[str, bytes, bool], bool]  # (topic, payload, retain) of an admitted message -> whether it is taken here


class Handler(BrokerProtocolHandler):
    """admits(topic): whether this client may publish there. tap: takes messages before they are routed."""

    admits: Callable[[str], bool] | None = None
    tap: Tap | None = None

    async def handle_publish(self, publish_packet: PublishPacket) -> None:
        """What the tap takes costs neither a queue nor a walk over all subscriptions."""
        topic, data, header = publish_packet.topic_name, publish_packet.data, publish_packet.variable_header
        if self.tap is None or self.admits is None or topic is None or data is None or publish_packet.qos > 1:
            await super().handle_publish(publish_packet)
        elif self.admits(topic) and self.tap(topic, bytes(data), bool(publish_packet.retain_flag)):
            if publish_packet.qos and header is not None and header.packet_id is not None:
                await self._send_packet(PubackPacket.build(header.packet_id))
        else:
            await super().handle_publish(publish_packet)

    def handle_read_timeout(self) -> None:
        """1.5 keep-alive intervals of silence: the connection is gone, and the will is due."""
        self._closing = asyncio.ensure_future(self.handle_connection_closed())

    async def handle_puback(self, puback: PubackPacket) -> None:
        """amqtt waits for an acknowledgement only after it has sent: a quick one came first, and cost 5 s."""
        header, session = puback.variable_header, self.session
        while header and session and header.packet_id in session.inflight_out:
            if header.packet_id in self._puback_waiters:
                await super().handle_puback(puback)
                return
            await asyncio.sleep(0.001)


@dataclass(frozen=True)
class Guard:
    """login(username, password, client id) and may(username, action, topic or filter): neither may block."""

    login: Callable[[str, str, str], bool]
    may: Callable[[str, str, str], bool]


class GuardedBroker(Broker):
    """A broker of clean sessions: what must outlive a connection is kept by the device and the bridge themselves."""

    def __init__(self, config: dict[str, Any], guard: Guard) -> None:
        super().__init__(config)
        self._guard = guard
        self._writers: set[asyncio.StreamWriter] = set()
        self.tap: Tap | None = None
        self.tls: ssl.SSLContext | None = None  # of the listener, once it listens
        self._deliveries: set[asyncio.Task[None]] = set()

    def deliver(self, client_id: str, topic: str, payload: bytes, then: Callable[[bool], None] | None) -> None:
        """To this client alone, in the broker's loop. then(True) when it is acknowledged, or when nobody could be asked."""
        task = asyncio.ensure_future(self._deliver(client_id, topic, payload, then))
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    async def _deliver(self, client_id: str, topic: str, payload: bytes, then: Callable[[bool], None] | None) -> None:
        try:
            session, handler = self._sessions.get(client_id, (None, None))
            if session is not None and handler is not None and session.transitions.state == "connected":
                await handler.mqtt_publish(topic, payload, 1, retain=False)
        except Exception as error:  # it went in between: who sent will hear nothing, and send again
            LOG.debug("broker: %s: %r", client_id, error)
        finally:
            if then is not None:
                then(True)

    def _create_ssl_context(self, listener: Any) -> ssl.SSLContext:
        """Kept, so that a renewed certificate can be loaded into it."""
        self.tls = super()._create_ssl_context(listener)
        return self.tls

    def bound_port(self, listener: str) -> int:
        instance: Any = self._servers[listener].instance
        return int(instance.sockets[0].getsockname()[1])

    async def end(self, timeout: float) -> None:
        """shutdown() ends early when a delivery is cut off; the port must be free afterwards in any case."""
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await asyncio.wait_for(self.shutdown(), timeout)
        for server in self._servers.values():
            instance: Any = server.instance
            instance.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)  # aborted transports close in the next turns of the loop

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        bounded = BoundedReader(StreamReaderAdapter(reader))
        self._writers.add(writer)
        try:
            await self._client_connected(listener_name, bounded, StreamWriterAdapter(writer))
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _initialize_client_session(
        self, reader: ReaderAdapter, writer: WriterAdapter, remote_address: str, remote_port: int
    ) -> tuple[BrokerProtocolHandler, Session]:
        try:
            prefix, body = await asyncio.wait_for(_connect_packet(reader), CONNECT_S)
            if body[PROTOCOL_LEVEL_AT] != MQTT_311:
                await ConnackPacket.build(0, UNACCEPTABLE_PROTOCOL_VERSION).to_stream(writer)
                raise MQTTError("protocol level")
            handler, session = await Handler.init_from_connect(
                BufferReader(prefix + body), writer, self.plugins_manager
            )
        except Exception as error:  # whatever a stranger's bytes lead to
            await writer.close()
            raise MQTTError(f"no CONNECT that is understood here: {error!r}") from None
        if not self._welcome(session):
            LOG.info("broker: refused %s from %s", session.username, remote_address)
            await ConnackPacket.build(0, NOT_AUTHORIZED).to_stream(writer)
            await writer.close()
            raise MQTTError("not authorised")
        client_id = session.client_id or ""
        if client_id in self._sessions:
            await self._take_over(client_id)
        session.clean_session, session.parent = True, 0
        handler.tap, username = self.tap, session.username or ""
        handler.admits = lambda topic: self._guard.may(username, "publish", topic)
        session.keep_alive = -(-session.keep_alive * 3 // 2)
        return handler, session

    def _welcome(self, session: Session) -> bool:
        if not session.username or not session.password or not session.client_id:
            return False
        if not self._guard.login(session.username, session.password, session.client_id):
            return False
        return not session.will_flag or self._guard.may(session.username, "publish", session.will_topic or "")

    async def end_session(self, client_id: str) -> None:
        if client_id in self._sessions:
            await self._take_over(client_id)

    async def _take_over(self, client_id: str) -> None:
        """The same client again: end the old connection, and its will is published before the new one is answered."""
        session, handler = self._sessions.pop(client_id)
        await self._del_all_subscriptions(session)
        await handler.handle_connection_closed()

    async def _authenticate(self, session: Session, _listener: Any) -> bool:
        return True  # done before the session was touched

    async def _topic_filtering(self, session: Session, topic: str, action: Action) -> bool:
        # Without a suspension point: the callers iterate over dictionaries that other tasks change.
        return self._guard.may(session.username or "", str(action), topic)

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        if any(known is session for known, _ in self._subscriptions.get(subscription[0], ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)
