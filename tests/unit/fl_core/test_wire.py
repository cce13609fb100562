"""The device's half of Flower's wire: no flwr in the process, object ids, error replies that Flower can read."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import IntegrityError
from fl_core.flower import adapter, wire
from fl_core.flower.messages import Request
from tests.federation import request
from tests.helpers import run_python


def test_a_device_process_loads_neither_flwr_nor_torch() -> None:
    code = (
        "import sys, json, fl_clients.training.link\n"
        "heavy = [m for m in sys.modules if m.partition('.')[0] in ('flwr', 'torch', 'numpy', 'fastapi')]\n"
        "rss = int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])\n"
        "print(json.dumps([heavy, rss]))"
    )
    heavy, resident_kb = json.loads(run_python(["-c", code]).stdout)
    assert heavy == []
    assert resident_kb < 50_000


def test_the_real_flwr_can_still_be_imported_afterwards() -> None:
    code = (
        "from fl_core.flower import wire\n"
        "import flwr.app, flwr.proto.fleet_pb2 as f, flwr\n"
        "assert flwr.__version__\n"
        "assert f.PullMessagesRequest.FromString(wire.fleet.PullMessagesRequest(node=wire.Node(node_id=7))"
        ".SerializeToString()).node.node_id == 7"
    )
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr


def instruction() -> Message:
    adapter.assume_identity(run_id=11, task_id=12, node_id=1)
    message = Message(request().to_record(), 42, "train", ttl=100.0, group_id="train-1")
    adapter.set_message_id(message, "ab" * 32)
    return message


def test_error_reply_is_what_flower_itself_would_read() -> None:
    asked = instruction()
    envelope, _, _ = adapter.deflate(Message(request().to_record(), reply_to=asked))
    proto = wire.message.Message.FromString(envelope)  # only its metadata is used: turn it round
    proto.metadata.message_id, proto.metadata.src_node_id, proto.metadata.dst_node_id = "ab" * 32, 1, 42
    reply = wire.error_reply(proto, "worker died " + "x" * 5000)
    (reply_id,) = reply.objects
    assert wire.object_id(reply.objects[reply_id]) == reply_id
    read = adapter.inflate(reply_id, dict(reply.objects), origin="device")
    assert read.has_error()
    assert read.error.code == wire.CLIENT_CRASHED
    assert read.error.reason.startswith("worker died")
    assert len(read.error.reason) == 2000
    assert (read.metadata.src_node_id, read.metadata.dst_node_id) == (42, 1)
    assert read.metadata.reply_to_message_id == "ab" * 32
    assert read.metadata.created_at + read.metadata.ttl <= time.time() + 100.1
    assert read.object_id == reply_id, "flwr spells the object as we do"


def test_deflate_then_inflate_returns_the_message() -> None:
    reply = Message(request().to_record(), reply_to=instruction())
    envelope, tree, objects = adapter.deflate(reply)
    ids = wire.tree_ids(wire.message.ObjectTree.FromString(tree), origin="reply")
    assert set(ids) == set(objects)
    assert ids[-1] == wire.message.Message.FromString(envelope).metadata.message_id
    assert all(wire.object_id(content) == name for name, content in objects.items())
    read = Request.from_record(adapter.inflate(ids[-1], objects, origin="reply").content, origin="reply")
    for name, array in request().arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)


@given(
    st.dictionaries(st.sampled_from([f"{i:064x}" for i in range(4)]), st.binary(max_size=60), max_size=4), st.binary()
)
def test_hostile_objects_are_refused_not_executed(objects: dict[str, bytes], first: bytes) -> None:
    with pytest.raises(IntegrityError, match="device-7"):
        adapter.inflate("0" * 64, {**objects, "0" * 64: first}, origin="device-7")


def test_an_object_that_is_no_message_is_refused() -> None:
    record = request().to_record()
    _, _, objects = adapter.deflate(Message(record, reply_to=instruction()))
    with pytest.raises(IntegrityError, match="not a message"):
        adapter.inflate(record.object_id, objects, origin="device-7")


def test_trees_are_bounded() -> None:
    deep = wire.message.ObjectTree(object_id="a" * 64)
    for _ in range(wire.MAX_TREE_DEPTH + 1):
        deep = wire.message.ObjectTree(object_id="a" * 64, children=[deep])
    with pytest.raises(IntegrityError, match="nested deeper"):
        wire.tree_ids(deep, origin="reply")
    wide = wire.message.ObjectTree(
        object_id="a" * 64,
        children=[wire.message.ObjectTree(object_id=f"{i:064x}") for i in range(wire.MAX_OBJECTS + 2)],
    )
    with pytest.raises(IntegrityError, match="more than"):
        wire.tree_ids(wide, origin="reply")
    with pytest.raises(IntegrityError, match="not an object id"):
        wire.tree_ids(wire.message.ObjectTree(object_id="../../etc/passwd"), origin="reply")


def test_a_reply_that_no_server_takes_is_found_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = wire.WireReply(1, "a" * 64, b"", b"", {f"{i:064x}": b"12345678" for i in range(4)})
    reply.check_limits()
    for limit, value in {"MAX_OBJECTS": 3, "MAX_MESSAGE_BYTES": 31, "MAX_OBJECT_BYTES": 7}.items():
        with monkeypatch.context() as patch:
            patch.setattr(wire, limit, value)
            with pytest.raises(IntegrityError, match="too large"):
                reply.check_limits()
