"""The device's half of the MQTT link: birth, state, death; commands in, replies and reports out through the disk outbox."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fl_clients.connection import Welcome
from fl_clients.edge.broker_account import as_welcome, broker_of, read_account
from fl_clients.edge.duties import WAKE
from fl_clients.edge.home import AgentHome
from fl_clients.edge.settings import MqttSettings, OutboxSettings
from fl_core.contracts.errors import IntegrityError
from fl_core.identity.keys import PrivateKey
from fl_core.link import topics
from fl_core.link.batch import RECORDS, RECORDS_TAKEN
from fl_core.link.envelope import COUNTER_LIMIT, Envelope, decode, encode
from fl_core.link.outbox import DeviceStore
from fl_core.link.record_log import RecordLog
from fl_core.link.session import BrokerAddress, Message, MqttSession, Outgoing

if TYPE_CHECKING:
    from fl_clients.tunnel import TunnelClient
    from fl_core.link.sealed import ReceiptReader

LOG = logging.getLogger(__name__)
Facts = Callable[[], dict[str, Any]]
LAST = COUNTER_LIMIT - 1  # number of a connection's last state, its will


class FieldLink:
    """Every method may be called on a device without MQTT; then nothing is sent and nothing arrives.

    Nobody is connected before the first ``enter``. facts() -> what a birth says of this device. changed() is called
    when the connection comes and goes; answered(store, number): the server keeps that store's records up to there.
    tunnel: shares the connection, for requests to the server.
    """

    def __init__(
        self,
        home: AgentHome,
        settings: MqttSettings,
        facts: Facts,
        changed: Callable[[], None],
        outbox: OutboxSettings,
        key: PrivateKey,
        *,
        answered: Callable[[str, int], None],
        tunnel: TunnelClient | None = None,
    ) -> None:
        self.name, self.fleet = "", ""
        self.boot = home.next_boot()
        self.store = DeviceStore(home.store_file, max_bytes=outbox.bytes, max_age_s=outbox.seconds)
        self.records = RecordLog(
            home.store_file, max_bytes=outbox.bytes, max_age_s=outbox.seconds, hold_s=outbox.hold_s
        )
        self._answered, self._key = answered, key
        self.session: MqttSession | None = None
        self._home, self._settings, self._facts, self._changed = home, settings, facts, changed
        self._account, self._tunnel = read_account(home.account_file), tunnel
        self._entered: tuple[Any, ...] = ()
        self._announcing = threading.Lock()
        self._numbers = itertools.count(1)

    @functools.cached_property
    def _receipts(self) -> ReceiptReader:
        from fl_core.link.sealed import ReceiptReader  # costs memory that a device without MQTT can spare

        return ReceiptReader(self._home.ca_file)

    @property
    def connected(self) -> bool:
        return self.session is not None and self.session.connected

    def enter(self, welcome: Welcome) -> None:
        """Connect as who the server says we are; anew where the name, the fleet, the broker or the account changed."""
        mqtt = broker_of(self._account) if self._account is not None else welcome.mqtt
        identity = (welcome.name, welcome.fleet, mqtt)
        if identity == self._entered:
            return
        self.stop()
        self.ring()  # who receives on the old session turns to the new one
        self.name, self.fleet, self._entered = welcome.name, welcome.fleet, identity
        self.session = self._session(self._home, mqtt, self._settings)
        if self._tunnel is not None:
            self._tunnel.attach(self.session, welcome.fleet, welcome.name)
        if self.session is not None:
            self.session.start()

    def enter_by_account(self) -> None:
        """Connect as the broker's account says, before the server has said anything."""
        if self._account is not None:
            self.enter(as_welcome(self._account))

    def stop(self) -> None:
        """Empty the outbox as far as possible, say that we stop, and disconnect."""
        if self.session is not None:
            self.session.stop(self._state("stopped")(self.session.connection))

    def close(self) -> None:
        self.store.close()
        self.records.close()

    def ring(self) -> None:
        """End a ``receive`` that waits. Safe in a signal handler."""
        if self.session is not None:
            self.session.ring()

    def receive(self, timeout: float) -> tuple[str, Envelope] | None:
        """(kind of topic, message) of the next one for this device; None after ``timeout`` seconds or a ring."""
        if self.session is None:
            return None
        message = self.session.receive(timeout)
        return None if message is None else self._read(message)

    def broker_facts(self) -> dict[str, Any] | None:
        """None on a device without MQTT, or before the first welcome."""
        session = self.session
        if session is None:
            return None
        facts = {"host": session.address.host, "port": session.address.port, "protocol": session.protocol}
        return {**facts, "connected": session.connected, "failure": session.failure}

    def announce(self) -> None:
        """The retained state, anew. Without a connection the next birth says it."""
        if self.session is not None:
            with self._announcing:
                self.session.publish(self._state("state")(self.session.connection))

    def report(self, kind: str, body: dict[str, Any], *, droppable: bool = False) -> None:
        """For the server's table, whenever and however it can be reached. droppable: first to go when space is short."""
        self.records.append(kind, body, droppable=droppable)

    def send_records(self, data: bytes) -> bool:
        """False without a connection. The server's answer comes to ``answered``."""
        session = self.session
        if session is None or not session.connected:
            return False
        from fl_core.link.sealed import seal

        payload = encode(
            Envelope(
                type=RECORDS,
                boot=self.boot,
                connection=session.connection,
                body=seal(data, self._key, self.fleet, self.name, have=self._receipts.have),
            )
        )
        return session.publish(Outgoing(topic=self._topic(topics.TELEMETRY), payload=payload)) is not None

    def finish(self, job_id: str, kind: str, body: dict[str, Any]) -> None:
        """The end of a job and its reply, in one transaction."""
        reply = self._signed(self._envelope(kind, job_id, body), topics.REPLY)
        self.store.finish(job_id, kind, self._topic(topics.REPLY), encode(reply))

    def finished(self, job_id: str) -> bool:
        return self.store.reply_of(job_id) is not None

    def repeat(self, job_id: str) -> None:
        reply = self.store.reply_of(job_id)
        if reply is not None:
            self.store.put(reply.topic, reply.payload)

    # inside

    def _session(self, home: AgentHome, mqtt: dict[str, Any] | None, settings: MqttSettings) -> MqttSession | None:
        if mqtt is None or not settings.enabled:
            return None
        address = BrokerAddress(
            host=mqtt["host"],
            port=mqtt["port"],
            username=mqtt["username"],
            password=mqtt["password"],
            client_id=mqtt["username"],
            ca=home.ca_file if mqtt["tls"] else None,
            protocol=settings.protocol,
            keepalive_s=settings.keepalive_s,
        )
        return MqttSession(
            address,
            subscriptions=[self._topic(kind) for kind in topics.TO_DEVICE],
            greeting=self._state("birth"),
            will=self._state("death"),
            store=self.store,
            changed=self._tell_change,
            tap=self._tunnel.tap if self._tunnel is not None else None,
        )

    def _tell_change(self) -> None:
        if self._tunnel is not None:
            self._tunnel.poke()
        self._changed()

    def _read(self, message: Message) -> tuple[str, Envelope] | None:
        found = topics.parse(message.topic)
        if found is None or found.device != self.name or found.kind not in topics.TO_DEVICE:
            return None
        try:
            content = decode(message.payload, origin=message.topic)
            if content.type == RECORDS_TAKEN:
                self._answered(*self._receipts.read(content.body, self.fleet, self.name))
                return None
            if found.kind == topics.COMMAND and content.type != WAKE:
                self._receipts.commands.check(content, self.fleet, self.name)
            return found.kind, content
        except IntegrityError as error:
            LOG.warning("agent: %s", error.message)
            return None

    def _topic(self, kind: str) -> str:
        return topics.topic(self.fleet, self.name, kind)

    def _envelope(self, kind: str, message_id: str, body: dict[str, Any]) -> Envelope:
        connection = self.session.connection if self.session is not None else 0
        return Envelope(type=kind, id=message_id, boot=self.boot, connection=connection, body=body)

    def _state(self, kind: str) -> Callable[[int], Outgoing]:
        def message(connection: int) -> Outgoing:
            body = self._facts() if kind in ("birth", "state") else {}
            content = Envelope(type=kind, boot=self.boot, connection=connection, body=body)
            number = LAST if kind == "death" else next(self._numbers)
            payload = encode(self._signed(content, topics.STATE, number))
            return Outgoing(topic=self._topic(topics.STATE), payload=payload, retain=True)

        return message

    def _signed(self, message: Envelope, kind: str, number: int = 0) -> Envelope:
        from fl_core.link.signed import sign_by_device  # as _receipts

        return sign_by_device(message, self._key, self.fleet, self.name, kind, number=number)
