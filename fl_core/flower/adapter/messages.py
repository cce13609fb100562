"""Flower messages as values: identity, ids, and the objects that they are sent as."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from flwr.app import Array, Message
from flwr.app.message import array, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

from fl_core.contracts.errors import IntegrityError
from fl_core.flower.adapter import steady

# flwr cuts arrays into pieces of 5 MiB; smaller ones bound what a server holds of many transfers at once.
setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1 << 20)  # noqa: B010 mypy: not exported

ARRAY_HEAD, CHUNK_HEAD = b"Array ", b"ArrayChunk "


def assume_identity(*, run_id: int, task_id: int | None, node_id: int) -> None:
    """``Message(...)`` stamps new messages from this process-wide identity; both grids set it first."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, task_id or 0, node_id


def empty_run(run_id: int) -> Run:
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """``metadata.message_id`` is read-only; a reply must be built from a message that has its id."""
    message.metadata.__dict__["_message_id"] = message_id


def inflate(message_id: str, objects: dict[str, bytes], *, origin: str) -> Message:
    """A message from its objects (emptied on the way, to save memory). Raises IntegrityError naming ``origin``."""
    try:
        found = inflate_object_from_contents(message_id, objects, objects=_arrays(objects))
    except (
        Exception
    ) as error:  # bytes from the network, read by foreign parsers: any of them may give up in its own way
        raise IntegrityError(f"{origin}: message is not readable: {type(error).__name__}: {error}") from None
    if not isinstance(found, Message):
        raise IntegrityError(f"{origin}: {message_id[:16]} is a {type(found).__name__}, not a message")
    set_message_id(found, message_id)
    return found


def _arrays(objects: dict[str, bytes]) -> dict[str, InflatableObject]:
    """The Arrays among these objects, each joined once from its chunks, which leave ``objects``.

    flwr's way holds the chunks, their bodies and two joined copies at a time: four models instead of two.
    """
    heads = {i: get_object_head_values_from_object_content(c) for i, c in objects.items() if c.startswith(ARRAY_HEAD)}
    found: dict[str, InflatableObject] = {}
    users = Counter(chunk for _, chunks, _ in heads.values() for chunk in set(chunks))
    for object_id, (_, chunks, _) in heads.items():
        table = json.loads(bytes(_body(objects.pop(object_id))))
        order = [chunks[i] for i in table["arraychunk_ids"]]
        if set(order) != set(chunks):
            raise ValueError("an array whose chunks are not those that it names")
        data = b"".join([_chunk(objects[i]) for i in order])
        for chunk in users.keys() & set(chunks):
            users[chunk] -= 1
            if not users[chunk]:
                del objects[chunk]
        found[object_id] = Array(table["dtype"], tuple(table["shape"]), table["stype"], data)
    return found


def _chunk(content: bytes) -> memoryview:
    if not content.startswith(CHUNK_HEAD):
        raise ValueError("a part of an array is not a chunk")
    return _body(content)


def _body(content: bytes) -> memoryview:
    """What follows the head."""
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


def deflate(reply: Message) -> tuple[bytes, bytes, dict[str, bytes]]:
    """(envelope, tree, objects by id) of a reply, as ``wire.WireReply`` holds them."""
    with no_object_id_recompute():
        set_message_id(reply, reply.object_id)
        tree = get_object_tree(reply).SerializeToString()
        objects = {i: o.deflate() for i, o in get_all_nested_objects(reply).items()}
        envelope = message_to_proto(remove_content_from_message(reply)).SerializeToString()
    return envelope, tree, objects


def stamp(message: Message, *, run_id: int, task_id: int | None, node_id: int) -> None:
    """Make a message one of this run, whichever run the process-wide identity named when it was built."""
    message.metadata.__dict__.update(_run_id=run_id, _src_task_id=task_id, _src_node_id=node_id)
    message.metadata.created_at = steady.seconds()


def children_of(content: bytes, origin: str) -> list[str]:
    try:
        return list(dict.fromkeys(get_object_children_ids_from_object_content(content)))
    except ValueError:
        raise IntegrityError(f"{origin}: an object of the message is not readable") from None


def children(contents: Mapping[str, bytes], parents: Iterable[str], origin: str) -> list[str]:
    """Ids that the heads of these objects name and that are not read yet."""
    found = dict.fromkeys(child for parent in parents for child in children_of(contents[parent], origin))
    return [i for i in found if i not in contents]
