"""Flower's Fleet calls from a device: one method each, statuses turned into the few things a device can do about them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from fl_clients.connection import Answer, Transport, Unreachable, Unregistered
from fl_clients.training import bulk
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire

T = TypeVar("T")
SMALL = 1 << 20
WAIT_MARGIN = 15.0
STALL_TIMEOUT = 60.0
HEARTBEAT_SECONDS = 30.0
_HEADERS = {"content-type": wire.MEDIA_TYPE, "accept": wire.MEDIA_TYPE}


class Gone(Exception):
    """The server no longer wants this: the run is over, the message expired, the object was deleted. Drop it."""


@dataclass(frozen=True)
class Instruction:
    """One message for this device, whole: its metadata and every object by content address."""

    envelope: Any
    objects: dict[str, bytes]

    @property
    def message_id(self) -> str:
        return str(self.envelope.metadata.message_id)

    @property
    def run_id(self) -> int:
        return int(self.envelope.metadata.run_id)

    @property
    def kind(self) -> str:
        return str(self.envelope.metadata.message_type)


class FleetClient:
    """bulk: use the server's whole-message requests; turned off by a server that has none.

    Raises Unreachable (try later), Unregistered (401: join again), Gone (drop it) or IntegrityError."""

    def __init__(self, connection: Transport, *, bulk: bool = True) -> None:
        self.connection, self.bulk, self.node = connection, bulk, wire.Node(node_id=0)
        self.repository: int | None = None  # the server's last word on it: grows with each publication

    def activate(self, node_id: int) -> None:
        """Close our own old session, if any, and open a new one: a restarted device is back at once."""
        self.node = wire.Node(node_id=node_id)
        with contextlib.suppress(Gone):  # it was not active
            self.deactivate()
        request = wire.fleet.ActivateNodeRequest(
            public_key=self.connection.signer.public_pem, heartbeat_interval=HEARTBEAT_SECONDS
        )
        answer = self._call("activate-node", request, wire.fleet.ActivateNodeResponse)
        self.node = wire.Node(node_id=answer.node_id)

    def deactivate(self) -> None:
        request = wire.fleet.DeactivateNodeRequest(node_id=self.node.node_id)
        self._call("deactivate-node", request, wire.fleet.DeactivateNodeResponse, timeout=5.0)

    def heartbeat(self) -> None:
        request = wire.heartbeat.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        self._call("send-node-heartbeat", request, wire.heartbeat.SendNodeHeartbeatResponse, timeout=10.0)

    def wait(self, seconds: float, *, every: float = 0.0, lost: bool = False) -> bool:
        """Block until there is a message for us, at most ``seconds``; also our sign of life.

        every: seconds until the next such call at the latest. lost: deliver again what we had accepted and not
        answered (we were restarted).
        """
        request = wire.fleet.PullMessagesRequest(node=self.node)
        path, body = wire.WAIT_PATH + _query(seconds, every, lost), request.SerializeToString()
        return (
            self._no_messages(lambda: self._post(path, body, limit=SMALL, timeout=seconds + WAIT_MARGIN)).status == 200
        )

    def receive(self, seconds: float, *, every: float = 0.0, lost: bool = False) -> Instruction | None:
        """``wait`` and ``pull`` in one: the next message, or None when none came in ``seconds``."""
        if self.bulk:
            try:
                return self._receive_bulk(seconds, every, lost)
            except bulk.NotOffered:
                self.bulk = False
        return self.pull() if self.wait(seconds, every=every, lost=lost) else None

    def pull(self) -> Instruction | None:
        """The next message with all its objects, or None. Raises IntegrityError when one is not what its id says."""
        request = wire.fleet.PullMessagesRequest(node=self.node)
        answer = self._call("pull-messages", request, wire.fleet.PullMessagesResponse, limit=wire.MAX_ENVELOPE_BYTES)
        if not answer.messages_list or not answer.message_object_trees:
            return None
        envelope = answer.messages_list[0]
        ids = wire.tree_ids(answer.message_object_trees[0], origin="message from the server")
        if ids[-1] != envelope.metadata.message_id:
            raise IntegrityError("message from the server: its id is not that of its objects")
        objects, total = dict[str, bytes](), 0
        for object_id in ids:
            objects[object_id] = self._pull_object(envelope.metadata.run_id, object_id)
            total += len(objects[object_id])
            if total > wire.MAX_MESSAGE_BYTES:
                raise IntegrityError(f"message from the server: over the limit of {wire.MAX_MESSAGE_BYTES:,} bytes")
        return Instruction(envelope, objects)

    def push(self, reply: wire.WireReply) -> None:
        """Hand in a reply, then confirm its instruction. May be repeated after any failure: ids are content addresses."""
        request = wire.fleet.PushMessagesRequest(
            node=self.node,
            messages_list=[wire.message.Message.FromString(reply.envelope)],
            message_object_trees=[wire.message.ObjectTree.FromString(reply.tree)],
        )
        if self.bulk:
            try:
                answered = bulk.push(self.connection, request.SerializeToString(), reply, headers=_HEADERS)
                self._check(answered, wire.PUSH_PATH)
                return
            except bulk.NotOffered:
                self.bulk = False
        answer = self._call("push-messages", request, wire.fleet.PushMessagesResponse, limit=wire.MAX_ENVELOPE_BYTES)
        for object_id in answer.objects_to_push:
            if object_id not in reply.objects:
                raise IntegrityError(f"the server asks for object {object_id[:16]} that is not in the reply")
            self._push_object(reply, object_id, answer.session_id)
        confirm = wire.message.ConfirmMessageReceivedRequest(
            node=self.node, run_id=reply.run_id, message_object_id=reply.instruction_id
        )
        self._call("confirm-message-received", confirm, wire.message.ConfirmMessageReceivedResponse)

    def _receive_bulk(self, seconds: float, every: float, lost: bool) -> Instruction | None:
        body = wire.fleet.PullMessagesRequest(node=self.node).SerializeToString()
        path = wire.PULL_PATH + _query(seconds, every, lost)
        try:
            found = bulk.receive(
                self.connection,
                path,
                body,
                timeout=max(seconds + WAIT_MARGIN, STALL_TIMEOUT),
                headers=_HEADERS,
                hear=self._hear,
            )
        except bulk.ObjectGone as gone:
            raise Gone(f"object {gone}") from None
        except DecodeError:
            raise IntegrityError(f"{self.connection.url}: the message is not readable") from None
        if isinstance(found, Answer):
            self._no_messages(lambda: self._check(found, wire.PULL_PATH))
            return None
        return None if found is None else Instruction(*found)

    def _no_messages(self, call: Callable[[], T]) -> T:
        """A refused wait concerns no message that could be dropped: something is wrong between the two of us."""
        try:
            return call()
        except Gone as refused:
            raise IntegrityError(f"{self.connection.url} refuses to hand out messages: {refused}") from None

    def _push_object(self, reply: wire.WireReply, object_id: str, session_id: str) -> None:
        request = wire.message.PushObjectRequest(
            node=self.node,
            run_id=reply.run_id,
            object_id=object_id,
            object_content=reply.objects[object_id],
            session_id=session_id,
        )
        answer = self._call("push-object", request, wire.message.PushObjectResponse, timeout=120.0)
        if not answer.stored:  # the session expired, or another upload of the same reply took its place: start over
            raise Unreachable(f"{self.connection.url}: object {object_id[:16]} was not stored")

    def _pull_object(self, run_id: int, object_id: str) -> bytes:
        request = wire.message.PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id)
        for _ in range(50):
            answer = self._call(
                "pull-object",
                request,
                wire.message.PullObjectResponse,
                limit=wire.MAX_OBJECT_BYTES + SMALL,
                timeout=120.0,
            )
            if not answer.object_found:
                raise Gone(f"object {object_id[:16]}")
            if answer.object_available:
                content = bytes(answer.object_content)
                if wire.object_id(content) != object_id:
                    raise IntegrityError(f"object {object_id[:16]} from the server: its content does not fit its id")
                return content
            time.sleep(0.1)  # a stock server announces messages before their objects are there
        raise Unreachable(f"{self.connection.url}: object {object_id[:16]} is announced but not there")

    def _call(self, name: str, request: Any, answer: Any, *, limit: int = SMALL, timeout: float = 30.0) -> Any:
        body = self._post(wire.FLEET_PATH + name, request.SerializeToString(), limit=limit, timeout=timeout).body
        try:
            return answer.FromString(body)
        except DecodeError:
            raise IntegrityError(f"{self.connection.url}: the answer to {name} is not readable") from None

    def _post(self, path: str, body: bytes, *, limit: int, timeout: float) -> Answer:
        answer = self.connection.request("POST", path, body, limit=limit, timeout=timeout, headers=_HEADERS)
        self._hear(answer.headers.items())
        self._check(answer, path.partition("?")[0])
        return answer

    def _hear(self, headers: Iterable[tuple[str, str]]) -> None:
        for name, value in headers:
            if name.lower() == wire.REPOSITORY_HEADER and value.isascii() and value.isdigit() and len(value) < 16:
                self.repository = int(value)

    def _check(self, answer: Answer, path: str) -> None:
        if answer.status == 401:
            raise Unregistered(f"{self.connection.url} refuses this device: {answer.reason()}")
        if answer.status >= 400:
            raise Gone(f"{path}: {answer.reason()}")


def _query(seconds: float, every: float, lost: bool) -> str:
    return f"?seconds={seconds:g}&every={max(every, seconds):g}&lost={int(lost)}"
