"""What the Mailbox writes is what flwr's own methods write, row for row; and what it refuses they refuse."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto

from fl_core.flower import adapter, wire
from fl_core.flower.adapter import LinkStore, Run
from fl_core.flower.messages import Reply, Request
from fl_core.identity import keys
from tests.helpers import eventually


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LinkStore]:
    found = LinkStore(tmp_path / "state.db")
    yield found
    found._state._engine.dispose()
    found._store._engine.dispose()


@pytest.fixture
def node(store: LinkStore, tmp_path: Path) -> int:
    found = store.enrol(keys.public_pem(keys.create_device_key(tmp_path / "device.key")))
    store.sign_of_life(found, 30.0)
    return found


def instruction(node: int, ttl: float = 60.0) -> Message:
    request = Request(
        application="toy_regression", config={}, round=1, num_rounds=1, seed=0, arrays={"w": np.zeros(3, np.float32)}
    )
    return Message(request.to_record(), node, MessageType.TRAIN, ttl=ttl, group_id="train-1")


def reply_to(store: LinkStore, run: Run, node: int) -> Message:
    (message_id,) = store.push(run, [instruction(node)])
    assert message_id is not None
    asked = store.load(message_id, origin="test")
    return Message(Reply(num_examples=3, metrics={"loss": 0.5}).to_record(), reply_to=asked)


def stored(reply: Message) -> Message:
    """As it comes out of a PushMessagesRequest."""
    envelope, _, _ = adapter.deflate(reply)
    return message_from_proto(wire.message.Message.FromString(envelope))


def rows(store: LinkStore, table: str) -> list[dict[str, Any]]:
    return list(store._state.query(f"SELECT * FROM {table}"))


def cleared(store: LinkStore, table: str) -> list[dict[str, Any]]:
    found = rows(store, table)
    store._state.query(f"DELETE FROM {table}")
    return found


def test_instructions_are_stored_as_flwr_stores_them(store: LinkStore, node: int) -> None:
    run = store.open_run("a")
    message = instruction(node)
    assert store.push(run, [message]) == [message.metadata.message_id]
    (ours,) = cleared(store, "message_ins")
    assert store._state.store_message_ins(remove_content_from_message(message)) == message.metadata.message_id
    assert rows(store, "message_ins") == [ours]


def test_replies_are_stored_as_flwr_stores_them(store: LinkStore, node: int) -> None:
    reply = stored(reply_to(store, store.open_run("a"), node))
    with store.together():
        assert store._mailbox.answer(reply)
        assert store._mailbox.answer(reply), "the same again changes nothing"
    (ours,) = cleared(store, "message_res")
    assert store._state.store_message_res(reply) == reply.metadata.message_id
    (theirs,) = rows(store, "message_res")
    stamped = ("created_at", "ttl")  # by the server's clock, at each call
    assert {k: v for k, v in ours.items() if k not in stamped} == {k: v for k, v in theirs.items() if k not in stamped}


@pytest.mark.parametrize(("field", "value"), [("_ttl", 1e6), ("_ttl", 0.0), ("created_at", 0.0), ("created_at", 4e9)])
def test_a_reply_lasts_as_long_as_its_instruction_whatever_it_says(
    store: LinkStore, node: int, field: str, value: float
) -> None:
    reply = stored(reply_to(store, store.open_run("a"), node))
    (asked,) = rows(store, "message_ins")
    setattr(reply.metadata, field, value) if field == "created_at" else reply.metadata.__dict__.update({field: value})
    began = time.time()
    with store.together():
        assert store._mailbox.answer(reply)
    (row,) = rows(store, "message_res")
    assert began <= row["created_at"] <= time.time()
    assert row["created_at"] + row["ttl"] == pytest.approx(asked["created_at"] + asked["ttl"])


@pytest.mark.parametrize(
    ("field", "value"),
    {"_run_id": 7, "_src_node_id": 7, "_reply_to_message_id": "f" * 64, "_dst_node_id": 7}.items(),
)
def test_what_flwr_refuses_is_refused(store: LinkStore, node: int, field: str, value: Any) -> None:
    reply = stored(reply_to(store, store.open_run("a"), node))
    reply.metadata.__dict__[field] = value
    with store.together():
        assert not store._mailbox.answer(reply)
    assert store._state.store_message_res(reply) is None


def test_no_instruction_to_an_unknown_node_or_of_a_run_that_is_over(store: LinkStore, node: int) -> None:
    run = store.open_run("a")
    assert store.push(run, [instruction(node), instruction(7)])[1] is None
    store.close_run(run, completed=True)
    assert store.push(run, [instruction(node)]) == [None]


def test_a_message_is_taken_once_and_as_flwr_hands_it_out(store: LinkStore, node: int) -> None:
    run = store.open_run("a")
    (message_id,) = store.push(run, [instruction(node)])
    assert store.undelivered(node)
    body, ids = store.take(node)
    assert ids[-1] == message_id
    assert store.take(node)[1] == []
    assert not store.undelivered(node)
    assert store.undelivered(node, lost=True)
    request = wire.fleet.PullMessagesRequest(node=wire.Node(node_id=node)).SerializeToString()
    again = store.fleet("pull-messages", request, node, b"").body
    ours, theirs = (wire.fleet.PullMessagesResponse.FromString(b) for b in (body, again))
    assert ours.messages_list == theirs.messages_list
    assert wire.tree_ids(theirs.message_object_trees[0], origin="flwr")[-1] == message_id
    assert set(wire.tree_ids(theirs.message_object_trees[0], origin="flwr")) == set(ids)


def test_an_expired_instruction_waits_for_nobody(store: LinkStore, node: int) -> None:
    store.push(store.open_run("a"), [instruction(node, ttl=0.05)])
    eventually(lambda: not store.undelivered(node), 60)
    assert store.take(node)[1] == []


def test_a_sign_of_life_is_flwrs_heartbeat(store: LinkStore, node: int) -> None:
    store.deactivate(node)
    assert store.online() == []
    store.sign_of_life(node, 90.0)
    assert store.online() == [node]
    (ours,) = rows(store, "node")
    store._state.acknowledge_node_heartbeat(node, 90.0)
    (theirs,) = rows(store, "node")
    assert theirs.pop("online_until") == pytest.approx(ours.pop("online_until"), abs=60)
    assert theirs == ours
    store._state.query("UPDATE node SET online_until=0")
    assert store.online() == []


def test_many_keys_are_enrolled_at_once(store: LinkStore, node: int, tmp_path: Path) -> None:
    pems = [keys.public_pem(keys.create_device_key(tmp_path / f"{i}.key")) for i in range(3)]
    found = store.enrol_all(pems)
    assert len({*found.values(), node}) == 4
    assert store.enrol_all(reversed(pems)) == found
    assert store.enrol(pems[0]) == found[pems[0]]
