"""Whole messages in one request each, where the server offers it: what Flower's Fleet calls carry one object at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fl_clients.connection import Answer, Transport, Unreachable
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire
from fl_core.flower.records import RecordReader, packed, packed_size

PIECE = 256 << 10
UPLOAD_TIMEOUT = 120.0
Received = tuple[Any, dict[str, bytes]]


class NotOffered(Exception):
    """This server speaks Flower's own calls only."""


class ObjectGone(Exception):
    """The message was taken back while it was being read."""


def receive(
    connection: Transport,
    path: str,
    body: bytes,
    *,
    timeout: float,
    headers: dict[str, str],
    hear: Callable[[Iterable[tuple[str, str]]], None],
) -> Answer | Received | None:
    """(envelope, objects by id) of the next message, None when there is none, or the server's refusal.

    hear(headers) is called with those of the answer.

    Raises NotOffered, ObjectGone, Unreachable, or IntegrityError for what is not the message it claims to be.
    """
    with connection.stream("POST", path, body, timeout=timeout, headers=headers) as response:
        hear(response.getheaders())
        if response.status == 204:
            return None
        if response.status != 200:
            answer = Answer(response.status, response.read(65_536), {})
            if answer.status == 404:
                raise NotOffered
            return answer
        records = _records(response, RecordReader(origin=connection.url))
        answered = wire.fleet.PullMessagesResponse.FromString(next(records, b""))
        if not answered.messages_list or not answered.message_object_trees:
            raise IntegrityError(f"{connection.url}: no message in the answer")
        envelope = answered.messages_list[0]
        ids = wire.tree_ids(answered.message_object_trees[0], origin="message from the server")
        if ids[-1] != envelope.metadata.message_id:
            raise IntegrityError("message from the server: its id is not that of its objects")
        return envelope, _objects(records, ids, connection.url)


def push(connection: Transport, envelope: bytes, reply: wire.WireReply, *, headers: dict[str, str]) -> Answer:
    """Raises NotOffered or Unreachable."""
    parts = [envelope, *reply.objects.values()]
    head = {**headers, "content-length": str(packed_size(parts))}
    answer = connection.request(
        "POST", wire.PUSH_PATH, packed(parts), limit=65_536, timeout=UPLOAD_TIMEOUT, headers=head
    )
    if answer.status == 404:
        raise NotOffered
    return answer


def _records(response: Any, reader: RecordReader) -> Iterator[bytes]:
    while data := response.read1(PIECE):
        yield from reader.feed(data)
    reader.end()


def _objects(records: Iterator[bytes], ids: list[str], url: str) -> dict[str, bytes]:
    objects = dict[str, bytes]()
    for object_id in ids:
        content = next(records, None)
        if content is None:
            raise Unreachable(f"{url}: the message is cut short")
        if not content:
            raise ObjectGone(object_id[:16])
        if wire.object_id(content) != object_id:
            raise IntegrityError(f"object {object_id[:16]} from the server: its content does not fit its id")
        objects[object_id] = content
    if next(records, None) is not None:
        raise IntegrityError(f"{url}: the message goes on after its last object")
    return objects
