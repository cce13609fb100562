"""One connection to a broker through one paho client: what is sent, what arrives, and what paho's callbacks noted.

The callbacks run on paho's thread and under its locks: they only take notes under the session's condition.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fl_core.contracts.errors import EnvironmentFault
from fl_core.link.envelope import SIZE_LIMIT

PACKET_LIMIT = 2 * SIZE_LIMIT
INBOX_LIMIT = 1_000
UNSUPPORTED_VERSION = {1, 132}  # return code of 3.1.1, reason code of 5
VERSIONS = {"5": paho.MQTTv5, "311": paho.MQTTv311}


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """Where and as whom to connect. ``ca`` None means plain TCP: for tests and brokers on the same machine.

    session_expiry_s: how long the broker keeps subscriptions and messages after a lost connection; 0 = not at all.
    """

    host: str
    port: int
    username: str
    password: str = field(repr=False)
    client_id: str
    ca: Path | None = None
    protocol: str = "auto"
    keepalive_s: int = 60
    session_expiry_s: int = 0


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A message to publish. ``expiry_s`` is used where the broker speaks MQTT 5; 0 = never."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    expiry_s: int = 0


@dataclass(frozen=True)
class Message:
    topic: str
    payload: bytes
    retained: bool


@dataclass
class Acknowledgement:
    """Settled when the broker has taken (or refused, or lost) a message."""

    done: bool = False
    refused: str = ""
    lost: bool = False  # the connection ended first: nobody knows
    then: Callable[[bool], None] | None = None  # told once, on any thread, whether the broker has taken it

    def settle(self) -> None:
        """Never under the session's condition: ``then`` may use the session."""
        then, self.then = self.then, None
        if then is not None:
            then(not self.refused and not self.lost)


@dataclass
class Connection:
    """What paho's callbacks noted about one connection; guarded by ``changed``, the session's condition."""

    number: int
    protocol: str
    changed: threading.Condition
    client: paho.Client | None = None
    answered: bool = False
    refusal: str = ""
    unsupported: bool = False
    subscribed: bool = False
    closed: bool = False
    max_packet: int = PACKET_LIMIT
    waiting: dict[int, Acknowledgement] = field(default_factory=dict)
    early: dict[int, str] = field(default_factory=dict)

    def note_answer(self, reason: Any, properties: Any) -> None:
        with self.changed:
            self.answered = True
            if reason.is_failure:
                self.refusal = f"the broker refused: {reason}"
                self.unsupported = reason.value in UNSUPPORTED_VERSION
            self.max_packet = min(PACKET_LIMIT, getattr(properties, "MaximumPacketSize", PACKET_LIMIT))
            self.changed.notify_all()

    def note_subscribed(self, reasons: Any) -> None:
        with self.changed:
            self.subscribed = True
            refused = [reason for reason in reasons if reason.is_failure]
            if refused:
                self.refusal = f"the broker refused a subscription: {refused[0]}"
            self.changed.notify_all()

    def note_published(self, mid: int, reason: Any) -> None:
        refused = str(reason) if reason.is_failure else ""
        with self.changed:
            ack = self.waiting.pop(mid, None)
            if ack is None:  # faster than the publisher could register it
                self.early[mid] = refused
            else:
                ack.done, ack.refused = True, refused
                if ack.then is None:  # else nobody waits under the condition, and waking threads is not free
                    self.changed.notify_all()
        if ack is not None:
            ack.settle()

    def note_closed(self) -> None:
        with self.changed:
            self.closed = True
            ended = list(self.waiting.values())
            for ack in ended:
                ack.done = ack.lost = True
            self.waiting.clear()
            self.changed.notify_all()
        for ack in ended:
            ack.settle()


@dataclass
class Inbox:
    """Received messages; when nobody takes them, new ones are dropped and counted.

    tap(message): asked first, on paho's thread; True = it has taken the message, which then is not queued.
    """

    # SimpleQueue: its put may be called from a signal handler
    messages: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)
    overflow: int = 0
    tap: Callable[[Message], bool] | None = None

    def take(self, message: paho.MQTTMessage) -> None:
        with contextlib.suppress(UnicodeDecodeError):  # a topic that is not UTF-8
            found = Message(message.topic, bytes(message.payload), bool(message.retain))
            if self.tap is not None and self.tap(found):
                return
            if self.messages.qsize() >= INBOX_LIMIT:
                self.overflow += 1
                return
            self.messages.put(found)


def open_client(
    connection: Connection, address: BrokerAddress, tls: ssl.SSLContext | None, will: Outgoing | None, inbox: Inbox
) -> paho.Client:
    """A paho client that notes everything on ``connection``; it is not connected yet and never reconnects by itself."""
    five = connection.protocol == "5"
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        address.client_id,
        clean_session=None if five else address.session_expiry_s == 0,
        protocol=VERSIONS[connection.protocol],
        reconnect_on_failure=False,
    )
    client.username_pw_set(address.username, address.password)
    if tls is not None:
        client.tls_set_context(tls)
    if will is not None:
        client.will_set(will.topic, will.payload, will.qos, will.retain)
    client.on_connect = lambda _c, _u, _flags, reason, properties: connection.note_answer(reason, properties)
    client.on_subscribe = lambda _c, _u, _mid, reasons, _properties: connection.note_subscribed(reasons)
    client.on_publish = lambda _c, _u, mid, reason, _properties: connection.note_published(mid, reason)
    client.on_message = lambda _c, _u, message: inbox.take(message)
    client.on_disconnect = lambda _c, _u, _flags, _reason, _properties: connection.note_closed()
    client.on_socket_open = _without_delay
    connection.client = client
    return client


def _without_delay(_client: paho.Client, _userdata: Any, opened: Any) -> None:
    """Else a short message waits some 40 ms for the acknowledgement of the one before."""
    with contextlib.suppress(OSError, AttributeError):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def tls_context(ca: Path | None) -> ssl.SSLContext | None:
    """Raises EnvironmentFault naming a file that holds no certificate."""
    if ca is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise EnvironmentFault(f"{ca}: not usable as the certificate authority: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
