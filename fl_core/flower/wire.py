"""Flower's Fleet protocol as a device speaks it: its protobuf messages, without the rest of flwr.

Importing ``flwr`` costs about 50 MB; its generated ``flwr.proto`` modules need only protobuf. Unless flwr is
loaded already, they are imported below a stand-in package, which is removed again afterwards: a process that later
imports flwr gets the real one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fl_core.contracts.errors import EnvironmentFault, IntegrityError

MEDIA_TYPE = "application/protobuf"
FLEET_PATH = "/v1/fleet/"
WAIT_PATH = "/fieldfleet/v1/wait"
PULL_PATH = "/fieldfleet/v1/pull"
PUSH_PATH = "/fieldfleet/v1/push"
WELCOME_PATH = "/fieldfleet/v1/welcome"
STATE_PATH = "/fieldfleet/v1/state"
REPOSITORY_PATH = "/fieldfleet/v1/repository/"
REPOSITORY_HEADER = "fieldfleet-repository"  # in each answer: a number that grows with each publication

MAX_OBJECTS = 20_000  # of one message: some thousands of arrays, each of a few objects
MAX_TREE_DEPTH = 16
MAX_OBJECT_BYTES = 8 << 20  # flwr cuts arrays into chunks of 5 MiB
MAX_ENVELOPE_BYTES = 8 << 20  # message metadata with its tree of object ids
MAX_MESSAGE_BYTES = 2 << 30  # all objects of one message

CLIENT_CRASHED = 8  # ErrorCode.CLIENT_APP_CRASHED
_MODULES = ("fleet_pb2", "heartbeat_pb2", "message_pb2", "node_pb2", "error_pb2")


def _load() -> dict[str, Any]:
    if "flwr" in sys.modules:
        return {name: importlib.import_module(f"flwr.proto.{name}") for name in _MODULES}
    spec = importlib.util.find_spec("flwr")
    if spec is None or spec.submodule_search_locations is None:
        raise EnvironmentFault("package flwr is not installed", remedy="pip install 'fieldfleet[client]'")
    stand_in = types.ModuleType("flwr")
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules["flwr"] = stand_in
    try:
        return {name: importlib.import_module(f"flwr.proto.{name}") for name in _MODULES}
    finally:
        for name in [n for n in sys.modules if n == "flwr" or n.startswith("flwr.")]:
            del sys.modules[name]


_proto = _load()
fleet: Any = _proto["fleet_pb2"]
heartbeat: Any = _proto["heartbeat_pb2"]
message: Any = _proto["message_pb2"]
Node: Any = _proto["node_pb2"].Node
Error: Any = _proto["error_pb2"].Error


@dataclass(frozen=True)
class WireReply:
    """A reply ready to be pushed, by content address, so that pushing it twice changes nothing.

    envelope: flwr.proto.Message without content. tree: flwr.proto.ObjectTree. objects: object id -> bytes.
    """

    run_id: int
    instruction_id: str
    envelope: bytes
    tree: bytes
    objects: dict[str, bytes]

    def check_limits(self) -> None:
        """Raises IntegrityError for a reply that no server takes."""
        size = sum(len(content) for content in self.objects.values())
        largest = max(len(content) for content in self.objects.values())
        if len(self.objects) > MAX_OBJECTS or size > MAX_MESSAGE_BYTES or largest > MAX_OBJECT_BYTES:
            raise IntegrityError(
                f"the reply is too large: {len(self.objects):,} objects of {size:,} bytes, the largest of {largest:,}"
            )


class FleetRefused(Exception):
    """A call that is answered with an HTTP status instead of a message."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def check_sender(request: Any, node: int, public_pem: bytes) -> None:
    """A node speaks for itself only. Raises FleetRefused for a Fleet request in another node's name."""
    fields = request.DESCRIPTOR.fields_by_name
    claimed = request.node.node_id if "node" in fields else getattr(request, "node_id", node)
    if claimed != node or ("public_key" in fields and request.public_key != public_pem):
        raise FleetRefused(401, "the request names another node than its signature")
    if "message_object_trees" not in fields:
        return
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise FleetRefused(400, "one message at a time")
    metadata = request.messages_list[0].metadata
    if metadata.src_node_id != node:
        raise FleetRefused(403, "a reply may only come from the node that was asked")
    try:
        ids = tree_ids(request.message_object_trees[0], origin="reply")
    except IntegrityError as error:
        raise FleetRefused(413, error.message) from None
    if ids[-1] != metadata.message_id:
        raise FleetRefused(400, "the message's id is not that of its objects")


def tree_ids(tree: Any, *, origin: str) -> list[str]:
    """Object ids of a tree, children before parents, each once. Raises IntegrityError for one that is too large."""
    found: dict[str, None] = {}
    for depth, object_id in _walk(tree, 0):
        if depth > MAX_TREE_DEPTH or len(found) > MAX_OBJECTS:
            raise IntegrityError(f"{origin}: more than {MAX_OBJECTS} objects, or nested deeper than {MAX_TREE_DEPTH}")
        if not is_object_id(object_id):
            raise IntegrityError(f"{origin}: {object_id[:80]!r} is not an object id")
        found[object_id] = None
    return list(found)


def _walk(tree: Any, depth: int) -> Iterator[tuple[int, str]]:
    if depth <= MAX_TREE_DEPTH:
        for child in tree.children:
            yield from _walk(child, depth + 1)
    yield depth, tree.object_id


def is_object_id(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def object_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def error_reply(instruction: Any, reason: str, *, code: int = CLIENT_CRASHED) -> WireReply:
    """Flower's error reply to an instruction (a flwr.proto.Message), made without flwr: the worker may be the fault."""
    asked = instruction.metadata
    created = time.time()
    metadata = message.Metadata(
        run_id=asked.run_id,
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=created,
        ttl=max(asked.created_at + asked.ttl - created, 1e-3),
        message_type=asked.message_type,
        **({"dst_task_id": asked.src_task_id} if asked.HasField("src_task_id") else {}),
    )
    reply = message.Message(metadata=metadata, error=Error(code=code, reason=reason[:2000]))
    body = reply.SerializeToString(deterministic=True)
    content = b"Message  %d\x00" % len(body) + body  # Flower's head: type, children (none), length of the body
    reply_id = object_id(content)
    reply.metadata.message_id = reply_id
    tree = message.ObjectTree(object_id=reply_id)
    return WireReply(
        asked.run_id, asked.message_id, reply.SerializeToString(), tree.SerializeToString(), {reply_id: content}
    )
