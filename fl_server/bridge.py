"""The server's half of the MQTT link: who is alive, what devices report, jobs to devices and their replies, wake-ups."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import EnvironmentFault, IntegrityError, RefusedError, unknown_name
from fl_core.link import topics
from fl_core.link.batch import RECORDS, RECORDS_TAKEN
from fl_core.link.envelope import Envelope, decode, encode, new_id
from fl_core.link.sealed import RecordGate
from fl_core.link.session import BrokerAddress, Message, MqttSession, Outgoing
from fl_server.device_table import DATABASE_NAME, DeviceTable, Job
from fl_server.field_commands import COMMANDS
from fl_server.telemetry import Telemetry
from fl_server.tunnel import TunnelServer

LOG = logging.getLogger(__name__)
JOB_VALID_S = 7 * 86_400.0
WAKE_EXPIRY_S = 60
Event = Callable[[str, str, Mapping[str, Any]], None]


def every_report(fleet: str) -> list[str]:
    return [topics.every_device(fleet, kind) for kind in topics.FROM_DEVICE]


class Bridge:
    """A service: start() ... stop(). ``home`` keeps devices.db.

    on_event(event, device, facts): birth, state, death, stopped, a report's type, reply; called on the bridge's own
    thread, must return soon. gate: checks what devices say and signs what is asked of
    them; without one records are left where they are and nothing else is checked.
    tunnel: takes the packets of devices' tunnels. telemetry: closed with the bridge.
    """

    def __init__(
        self,
        home: Path,
        fleet: str,
        address: BrokerAddress,
        *,
        on_event: Event | None = None,
        tunnel: TunnelServer | None = None,
        gate: RecordGate | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.fleet = fleet
        self.table = DeviceTable(home / DATABASE_NAME, telemetry)
        self.session = MqttSession(
            address,
            subscriptions=every_report(fleet),
            prepare=self.table.forget_alive,
            tap=tunnel.tap if tunnel is not None else None,
            changed=tunnel.link_changed if tunnel is not None else None,
        )
        if tunnel is not None:
            tunnel.attach(self.session)
        self._gate = gate
        self._on_event: Event = on_event or (lambda event, device, facts: None)
        self._answered = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt-bridge", daemon=True)

    def start(self, *, timeout: float = 15.0) -> None:
        """Raises EnvironmentFault when the broker cannot be reached or refuses the server's account."""
        self.session.start()
        if not self.session.wait_connected(timeout):
            failure = self.session.failure or f"no answer from {self.session.address.host}"
            self.session.stop(timeout=1.0)
            raise EnvironmentFault(
                f"MQTT broker: {failure}", remedy="is the broker running, with the files of HOME/broker?"
            )
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self.session.stop()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self.table.close()

    def renew(self, gate: RecordGate) -> None:
        """With the server's new certificate."""
        self._gate = gate

    # for callers

    def devices(self) -> list[dict[str, Any]]:
        """See DeviceTable.devices: every device that ever announced itself."""
        return self.table.devices()

    def command(self, device: str, kind: str, body: Mapping[str, Any] | None = None, *, job_id: str = "") -> str:
        """Ask a device for one of COMMANDS. Returns the job id; the job survives restarts of either side.

        A job that the device does not get now is sent again when it is next born; repeating a ``job_id`` is harmless.
        """
        if kind not in COMMANDS:
            raise unknown_name("command", kind, list(COMMANDS))
        job = Job(job_id or new_id(), device, kind, dict(body or {}), None)
        self.table.add_job(job, valid_s=JOB_VALID_S)
        self._send(job)
        return job.id

    def wait_reply(self, job_id: str, timeout: float) -> dict[str, Any] | None:
        """The reply's body ({"ok": bool, ...}), or None after ``timeout`` seconds."""
        found: list[dict[str, Any]] = []

        def answered() -> bool:
            job = self.table.job(job_id)
            if job is not None and job.reply is not None:
                found.append(job.reply)
            return bool(found)

        with self._answered:
            self._answered.wait_for(answered, timeout)
        return found[0] if found else None

    def wait_alive(self, names: Iterable[str], timeout: float) -> bool:
        """Until every one of these devices is alive."""
        wanted = set(names)

        def all_alive() -> bool:
            return wanted <= {d["name"] for d in self.table.devices() if d["alive"]}

        with self._answered:
            return self._answered.wait_for(all_alive, timeout)

    def wake(self, names: Iterable[str]) -> None:
        """Ring these devices: there is a message for them on the server. Lost rings cost one safety poll."""
        for name in names:
            message = encode(Envelope(type="wake"))
            self.session.publish(
                Outgoing(topic=self._topic(name, topics.COMMAND), payload=message, expiry_s=WAKE_EXPIRY_S)
            )

    def desire(self, name: str, body: Mapping[str, Any]) -> None:
        """What this device should be: kept by the broker, and heard by the device now or when it connects."""
        message = encode(Envelope(type="desired", body=dict(body)))
        self.session.publish(Outgoing(topic=self._topic(name, topics.DESIRED), payload=message, retain=True))

    # the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            message = self.session.receive(0.5)
            if message is None:
                continue
            try:
                self._take(message)
            except (IntegrityError, RefusedError) as error:
                LOG.warning("bridge: %s", error.message)
            except Exception:
                LOG.exception("bridge: message on %s", message.topic)

    def _take(self, message: Message) -> None:
        found = topics.parse(message.topic)
        if found is None or found.fleet != self.fleet or not message.payload:
            return
        content = decode(message.payload, origin=message.topic)
        if self._gate is not None and content.type != RECORDS:  # records have a gate of their own
            self._gate.check(content, found.device, found.kind)
            if found.kind == topics.STATE and not self.table.next_in_place(found.device, content):
                LOG.info("bridge: %s: older than what this device has said", message.topic)
                return
        if found.kind == topics.STATE:
            if not self.table.note_state(found.device, content):
                return
            if content.type == "birth":
                for job in self.table.open_jobs(found.device):
                    self._send(job)
        elif found.kind == topics.REPLY:
            if not self.table.note_reply(found.device, content):
                return
        elif content.type == RECORDS:
            self._take_records(found.device, content)
            return
        elif not self.table.note_report(found.device, content):
            return
        with self._answered:
            self._answered.notify_all()
        event = "reply" if found.kind == topics.REPLY else content.type
        self._on_event(event, found.device, {**content.body, "id": content.id})

    def _take_records(self, device: str, content: Envelope) -> None:
        """Keep a batch, and say so: only then does its device let go of it."""
        if self._gate is None:
            return
        batch = self._gate.open(content.body, device)
        taken = self.table.take_records(device, batch)
        receipt = self._gate.receipt(device, batch.store, taken.upto, have=content.body.get("have"))
        answer = Envelope(type=RECORDS_TAKEN, body=receipt)
        # A lost answer costs one more batch: nothing waits in a broker for a device that is away.
        self.session.publish(Outgoing(topic=self._topic(device, topics.COMMAND), payload=encode(answer), qos=0))
        with self._answered:
            self._answered.notify_all()
        for record in taken.fresh:
            self._on_event(record.kind, device, {**record.body, "id": f"{record.seq}"})

    def _send(self, job: Job) -> None:
        command = Envelope(type=job.type, id=job.id, body=job.body)
        if self._gate is not None:
            command = self._gate.commands.sign(command, job.device)
        self.session.publish(Outgoing(topic=self._topic(job.device, topics.COMMAND), payload=encode(command)))

    def _topic(self, device: str, kind: str) -> str:
        return topics.topic(self.fleet, device, kind)


def ask(
    address: BrokerAddress,
    fleet: str,
    device: str,
    kind: str,
    body: Mapping[str, Any],
    *,
    timeout: float,
    gate: RecordGate | None = None,
) -> dict[str, Any]:
    """One command without a bridge (an operator's command line): publish, wait for the reply.

    gate: signs the command and checks the reply. Raises RefusedError when the broker or the device does not answer in time.
    """
    if kind not in COMMANDS:
        raise unknown_name("command", kind, list(COMMANDS))
    request = Envelope(type=kind, body=dict(body))
    reply_topic = topics.topic(fleet, device, topics.REPLY)
    session = MqttSession(address, subscriptions=[reply_topic])
    session.start()
    try:
        if not session.wait_connected(timeout):
            raise RefusedError(
                f"MQTT broker: {session.failure or 'no answer'}", remedy="is 'fieldfleet server run' running?"
            )
        sent = encode(request if gate is None else gate.commands.sign(request, device))
        session.deliver(Outgoing(topic=topics.topic(fleet, device, topics.COMMAND), payload=sent), timeout)
        return _await_reply(session, request, device, timeout, gate)
    finally:
        session.stop()


def _await_reply(
    session: MqttSession, request: Envelope, device: str, timeout: float, gate: RecordGate | None
) -> dict[str, Any]:
    import time

    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        message = session.receive(left)
        if message is None:
            break
        try:
            content = decode(message.payload, origin=message.topic)
            if gate is not None:
                gate.check(content, device, topics.REPLY)
        except (IntegrityError, RefusedError) as error:
            LOG.info("reply: %s", error.message)
            continue
        if content.id == request.id:
            return content.body
    raise RefusedError(
        f"device {device!r} did not answer {request.type!r} within {timeout:.0f} s",
        remedy="is it online? see 'fieldfleet server status'",
    )
