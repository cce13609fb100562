"""One MQTT session around paho: MQTT 5 with fall back to 3.1.1, TLS, will, re-subscription, backoff, disk outbox.

Paho's callbacks only note what happened; received messages wait in ``receive``. Each connection is a fresh paho
client, so that the will and the greeting carry the number of the connection, and nothing is queued inside paho:
what must survive lies in the DeviceStore.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fl_core.contracts.errors import IntegrityError
from fl_core.link.backoff import Backoff
from fl_core.link.connection import (
    PACKET_LIMIT,
    Acknowledgement,
    BrokerAddress,
    Connection,
    Inbox,
    Message,
    Outgoing,
    open_client,
    tls_context,
)
from fl_core.link.outbox import DeviceStore

__all__ = ["PACKET_LIMIT", "BrokerAddress", "Message", "MqttSession", "Outgoing"]

LOG = logging.getLogger(__name__)
WINDOW = 16  # outbox messages in flight
HANDSHAKE_S = 10.0
DRAIN_S = 2.0  # for the outbox, and again for the farewell

Speech = Callable[[int], Outgoing | None]


class MqttSession:
    """start() ... receive() / publish() / deliver() ... stop(). Thread-safe.

    greeting(connection) is published first on each connection, after the subscriptions stand; will(connection) is
    what the broker publishes when the connection is lost. ``connection`` counts from 1 since start(). prepare() is
    called before each attempt, changed() after a connection stands and after it is lost. tap(message) is asked first, on
    paho's thread, whether it takes a message; what it takes does not come to ``receive``.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        subscriptions: Sequence[str] = (),
        greeting: Speech | None = None,
        will: Speech | None = None,
        store: DeviceStore | None = None,
        prepare: Callable[[], None] | None = None,
        changed: Callable[[], None] | None = None,
        tap: Callable[[Message], bool] | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.address = address
        self._subscriptions, self._greeting, self._will = tuple(subscriptions), greeting, will
        self._store, self._prepare, self._on_change = store, prepare, changed
        self._backoff = backoff or Backoff()
        self._protocol = "5" if address.protocol == "auto" else address.protocol
        self._tls = tls_context(address.ca)
        self._changed = threading.Condition()
        self._inbox = Inbox(tap=tap)
        self._ready: Connection | None = None
        self._count = 0
        self._stopping, self._stop_deadline = False, 0.0
        self._farewell: Outgoing | None = None
        self._nudged = False
        self._thread: threading.Thread | None = None
        self.failure = ""  # why the last attempt failed; "" while connected

    # for callers

    def start(self) -> None:
        if self._store is not None:
            self._store.listen(self._nudge)
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self.address.client_id}", daemon=True)
        self._thread.start()

    def stop(self, farewell: Outgoing | None = None, *, timeout: float = 5.0) -> None:
        """Publish what the outbox holds and ``farewell`` if connected, then disconnect; the will is not sent."""
        with self._changed:
            self._farewell, self._stopping = farewell, True
            self._stop_deadline = time.monotonic() + DRAIN_S
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        if self._store is not None:
            self._store.listen(None)

    @property
    def connected(self) -> bool:
        connection = self._ready
        return connection is not None and not connection.closed

    @property
    def protocol(self) -> str:
        """ "5" or "311": what is spoken, or tried next."""
        return self._protocol

    @property
    def connection(self) -> int:
        return self._count

    @property
    def largest_packet(self) -> int:
        """What the broker takes, as far as it said so."""
        connection = self._ready
        return PACKET_LIMIT if connection is None else connection.max_packet

    def wait_connected(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.connected, timeout)

    def ring(self) -> None:
        """Make ``receive`` return None now. Safe in a signal handler."""
        self._inbox.messages.put(None)

    def receive(self, timeout: float) -> Message | None:
        """The next message; None after ``timeout`` seconds or a ring."""
        try:
            return self._inbox.messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def publish(self, message: Outgoing, then: Callable[[bool], None] | None = None) -> Acknowledgement | None:
        """Hand over without waiting; None when there is no connection. Raises IntegrityError for a message too large.

        then(taken): called once, on any thread, when the broker has taken it or it is lost; not for None.
        """
        connection = self._ready
        return None if connection is None or connection.closed else self._publish(connection, message, then)

    def deliver(self, message: Outgoing, timeout: float) -> bool:
        """Publish and wait until the broker has taken it."""
        ack = self.publish(message)
        if ack is None:
            return False
        with self._changed:
            self._changed.wait_for(lambda: ack.done, timeout)
        return ack.done and not ack.refused and not ack.lost

    # the supervising thread

    def _run(self) -> None:
        told = ""
        while not self._stopping:
            connection = Connection(self._count + 1, self._protocol, self._changed)
            self._count += 1
            try:
                self._serve(connection)
            except OSError as error:  # name resolution, TCP, TLS: ssl.SSLError is one
                self.failure = f"{self.address.host}:{self.address.port}: {error}"
            except Exception:
                LOG.exception("MQTT session: unexpected failure")
                self.failure = "unexpected failure"
            finally:
                self._close(connection)
            if connection.unsupported and self._fall_back(connection):
                continue
            if self.failure and self.failure != told and not self._stopping:
                LOG.warning("MQTT: %s", self.failure)
            told = self.failure
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, self._backoff.next())

    def _fall_back(self, connection: Connection) -> bool:
        """Only with "auto": 3.1.1 after a refused MQTT 5, and the other one after a silent close."""
        if self.address.protocol != "auto":
            return False
        self._protocol = "311" if connection.protocol == "5" else "5"
        return self._protocol == "311"

    def _serve(self, connection: Connection) -> None:
        if self._prepare is not None:
            self._prepare()
        will = self._will(connection.number) if self._will else None
        client = open_client(connection, self.address, self._tls, will, self._inbox)
        client.connect_timeout = HANDSHAKE_S
        options: dict[str, Any] = {}
        if connection.protocol == "5":
            properties = Properties(PacketTypes.CONNECT)
            properties.MaximumPacketSize = PACKET_LIMIT
            properties.SessionExpiryInterval = self.address.session_expiry_s
            options = {"clean_start": self.address.session_expiry_s == 0, "properties": properties}
        client.connect(self.address.host, self.address.port, keepalive=self.address.keepalive_s, **options)
        client.loop_start()
        if not self._handshake(connection, client):
            return
        self._backoff.reset()
        self.failure = ""
        with self._changed:
            self._ready = connection
            self._changed.notify_all()
        try:
            self._tell_change()
            self._pump(connection)
        finally:
            self._tell_change()

    def _tell_change(self) -> None:
        if self._on_change is not None:
            self._on_change()

    def _handshake(self, connection: Connection, client: paho.Client) -> bool:
        def answered() -> bool:
            return connection.answered or connection.closed or self._stopping

        with self._changed:
            self._changed.wait_for(answered, HANDSHAKE_S)
        if not connection.answered or connection.refusal:
            # some old brokers close at a MQTT 5 CONNECT without a word
            connection.unsupported = connection.unsupported or (connection.closed and not connection.answered)
            self.failure = f"{self.address.host}:{self.address.port}: {connection.refusal or 'no answer to CONNECT'}"
            return False
        if self._subscriptions:
            client.subscribe([(name, 1) for name in self._subscriptions])
            with self._changed:
                self._changed.wait_for(
                    lambda: connection.subscribed or connection.closed or self._stopping, HANDSHAKE_S
                )
            if not connection.subscribed or connection.refusal:
                self.failure = connection.refusal or "no answer to SUBSCRIBE"
                return False
        greeting = self._greeting(connection.number) if self._greeting else None
        if greeting is not None:
            self._publish(connection, greeting)
        return True

    def _pump(self, connection: Connection) -> None:
        """Publish the outbox until the connection ends; on stop, what is left, then the farewell."""
        in_flight: dict[int, Acknowledgement] = {}
        last = 0
        while not connection.closed:
            if self._store is not None:
                self._settle(self._store, in_flight)
                for item in self._store.waiting(after=last, limit=WINDOW - len(in_flight)):
                    last = item.seq
                    in_flight[item.seq] = self._publish_stored(connection, item.topic, item.payload)
            if self._stopping and (not in_flight or time.monotonic() > self._stop_deadline):
                break
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        connection.closed
                        or (self._stopping and not in_flight)
                        or self._nudged
                        or any(ack.done for ack in in_flight.values())
                    ),
                    DRAIN_S if self._stopping else None,
                )
                self._nudged = False
        if self._farewell is not None and not connection.closed:
            self.deliver(self._farewell, DRAIN_S)

    @staticmethod
    def _settle(store: DeviceStore, in_flight: dict[int, Acknowledgement]) -> None:
        settled = [seq for seq, ack in in_flight.items() if ack.done and not ack.lost]
        for seq in settled:
            refused = in_flight.pop(seq).refused
            if refused:  # it would be refused again for ever
                LOG.error("outbox: message %d dropped, the broker refused it: %s", seq, refused)
        store.done(settled)

    def _publish_stored(self, connection: Connection, topic: str, payload: bytes) -> Acknowledgement:
        try:
            return self._publish(connection, Outgoing(topic=topic, payload=payload))
        except IntegrityError as error:
            LOG.error("outbox: %s: dropped", error)
            return Acknowledgement(done=True, refused=str(error))

    def _publish(
        self, connection: Connection, message: Outgoing, then: Callable[[bool], None] | None = None
    ) -> Acknowledgement:
        size = len(message.payload) + len(message.topic) + 64
        if size > connection.max_packet:
            raise IntegrityError(f"{message.topic}: {size:,} bytes are over the broker's {connection.max_packet:,}")
        properties = None
        if message.expiry_s and connection.protocol == "5":
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = message.expiry_s
        ack = Acknowledgement(then=then)
        client = connection.client
        if client is None:  # it ended just now
            ack.done = ack.lost = True
            ack.settle()
            return ack
        # Never under the condition: paho calls back while it holds the locks that publish() needs.
        info = client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        with self._changed:
            if connection.closed:
                ack.done = ack.lost = True
            elif info.mid in connection.early:
                ack.done, ack.refused = True, connection.early.pop(info.mid)
            else:
                connection.waiting[info.mid] = ack
        if ack.done:
            ack.settle()
        return ack

    def _close(self, connection: Connection) -> None:
        with self._changed:
            self._ready = None
        client = connection.client
        if client is not None:
            with contextlib.suppress(OSError, ValueError):
                client.disconnect()
            client.loop_stop()
            left = client.socket()
            if left is not None:  # paho's loop ended before it could write DISCONNECT
                left.close()
            connection.client = None  # no cycle: paho closes its own sockets when its client goes
        connection.note_closed()

    def _nudge(self) -> None:
        with self._changed:
            self._nudged = True
            self._changed.notify_all()
