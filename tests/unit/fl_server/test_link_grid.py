"""LinkGrid over the real SuperLink: messages out, replies in, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType

from fl_clients.connection import Unreachable
from fl_clients.training.fleet import FleetClient, Gone, Instruction
from fl_core.contracts.errors import IntegrityError, Interrupted, RefusedError
from fl_core.flower import adapter, wire
from fl_core.flower.adapter import Exchange
from fl_core.flower.messages import Reply, Request
from fl_core.flower.records import packed, packed_size
from fl_server.link_grid import LinkGrid
from fl_server.superlink import SuperLink
from tests.federation import ARRAYS, joined, new_home, request, running


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[SuperLink]:
    with running(new_home(tmp_path / "home")) as found:
        yield found


both = pytest.mark.parametrize("bulk", [True, False], ids=["whole messages", "Flower's calls"])


def send(grid: LinkGrid, client: FleetClient, round: int = 1) -> str:
    message = grid.create_message(request(round).to_record(), MessageType.TRAIN, client.node.node_id, f"train-{round}")
    (message_id,) = grid.push_messages([message])
    return message_id


def answer(instruction: Instruction, arrays: dict[str, np.ndarray] | None = None) -> wire.WireReply:
    asked = adapter.inflate(instruction.message_id, dict(instruction.objects), origin="server")
    found = Request.from_record(asked.content, origin="server")
    arrays = arrays or {name: np.asarray(array) + 1 for name, array in found.arrays.items()}
    reply = Message(Reply(num_examples=3, metrics={"loss": 0.5}, arrays=arrays).to_record(), reply_to=asked)
    envelope, tree, objects = adapter.deflate(reply)
    return wire.WireReply(instruction.run_id, instruction.message_id, envelope, tree, objects)


def rows(superlink: SuperLink) -> tuple[int, ...]:
    """What the store still holds: instructions, replies, objects."""
    state = superlink.store._state
    return state.num_message_ins(), state.num_message_res(), len(state.object_store)


@both
def test_one_round_trip_leaves_nothing_behind(superlink: SuperLink, tmp_path: Path, bulk: bool) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1", bulk=bulk)
    assert list(grid.device_names().values()) == ["van-1"]
    message_id = send(grid, client)
    assert grid.pending("train-1") == {message_id: client.node.node_id}
    assert client.wait(0)
    instruction = client.receive(0)
    assert instruction is not None
    assert (instruction.message_id, instruction.kind) == (message_id, MessageType.TRAIN)
    assert not client.wait(0)
    assert grid.wait_ready({message_id}, 0.01) == set()
    client.push(answer(instruction))
    assert grid.wait_ready({message_id, "other"}, 5) == {message_id}
    (reply,) = grid.pull_messages([message_id])
    read = Reply.from_record(reply.content, origin="van-1")
    np.testing.assert_array_equal(read.arrays["weight"], ARRAYS["weight"] + 1)
    assert read.arrays["bias"].dtype == np.float64
    grid.forget([message_id, ""])
    assert rows(superlink) == (0, 0, 0)


@both
def test_a_waiting_device_is_woken_and_a_waiting_engine_too(superlink: SuperLink, tmp_path: Path, bulk: bool) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1", bulk=bulk)

    def device() -> None:
        instruction = client.receive(60)
        assert instruction is not None
        client.push(answer(instruction))

    thread = threading.Thread(target=device)
    thread.start()
    began = time.monotonic()
    message_id = send(grid, client)
    assert grid.wait_ready({message_id}, 30) == {message_id}
    assert time.monotonic() - began < 5
    thread.join(10)


def test_listeners_hear_of_pushed_messages(superlink: SuperLink, tmp_path: Path) -> None:
    heard: list[list[int]] = []
    superlink.bell.on_push(heard.append)
    client = joined(superlink, tmp_path, "van-1")
    send(superlink.grid(), client)
    assert heard == [[client.node.node_id]]


def test_a_reply_may_be_pushed_again_after_any_failure(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1", bulk=False)
    message_id = send(grid, client)
    instruction = client.pull()
    assert instruction is not None
    reply = answer(instruction)
    whole, uploads = client._push_object, 0

    def cut(reply: wire.WireReply, object_id: str, session_id: str) -> None:
        nonlocal uploads
        uploads += 1
        if uploads == 3:
            raise ConnectionError("as the test asked")
        whole(reply, object_id, session_id)

    client._push_object = cut  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        client.push(reply)
    assert grid.wait_ready({message_id}, 0.01) == set(), "half a reply is no reply"
    client.push(reply)
    client.push(reply)
    assert grid.wait_ready({message_id}, 5) == {message_id}
    assert Reply.from_record(grid.pull_messages([message_id])[0].content, origin="van-1").num_examples == 3


LARGE = {f"layer-{i}": np.full(300_000, i, np.float32) for i in range(4)}  # 1.2 MB each: more than one piece and batch


def test_a_bulk_upload_that_is_cut_is_no_reply(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    message_id = send(grid, client)
    instruction = client.receive(0)
    assert instruction is not None
    reply = answer(instruction, LARGE)
    contents = list(reply.objects.values())
    request = wire.fleet.PushMessagesRequest(
        node=client.node,
        messages_list=[wire.message.Message.FromString(reply.envelope)],
        message_object_trees=[wire.message.ObjectTree.FromString(reply.tree)],
    )
    envelope = request.SerializeToString()
    headers = {"content-length": str(packed_size([envelope, *contents]))}

    def cut() -> Iterator[bytes]:
        yield from packed([envelope, *contents[:-2]])
        raise ConnectionError("as the test asked")

    with pytest.raises(Unreachable):
        client.connection.request("POST", wire.PUSH_PATH, cut(), limit=99, headers=headers)
    short = [envelope, *contents[:-1]]
    size = {"content-length": str(packed_size(short))}
    with pytest.raises(Unreachable, match="missing"):  # a whole request without all of its objects
        client.connection.request("POST", wire.PUSH_PATH, packed(short), limit=99, headers=size)
    assert grid.wait_ready({message_id}, 0.01) == set()
    client.push(reply)
    client.push(reply)
    assert grid.wait_ready({message_id}, 5) == {message_id}
    read = Reply.from_record(grid.pull_messages([message_id])[0].content, origin="van-1")
    for name, array in LARGE.items():
        np.testing.assert_array_equal(read.arrays[name], array)
    grid.forget([message_id])
    assert rows(superlink) == (0, 0, 0)


@both
def test_a_large_model_arrives_whole(superlink: SuperLink, tmp_path: Path, bulk: bool) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1", bulk=bulk)
    record = request(1, LARGE).to_record()
    (message_id,) = grid.push_messages([grid.create_message(record, MessageType.TRAIN, client.node.node_id, "train-1")])
    instruction = client.receive(0)
    assert instruction is not None
    assert max(map(len, instruction.objects.values())) < 1_100_000
    asked = adapter.inflate(message_id, dict(instruction.objects), origin="server")
    for name, array in Request.from_record(asked.content, origin="server").arrays.items():
        np.testing.assert_array_equal(array, LARGE[name])


def test_an_old_server_is_spoken_to_in_flower_s_own_calls(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    message_id = send(grid, client)
    whole = client.connection.stream

    def elsewhere(method: str, path: str, body: bytes, **more: Any) -> Any:
        return whole(method, path.replace(wire.PULL_PATH, "/fieldfleet/v0/pull"), body, **more)

    client.connection.stream = elsewhere  # type: ignore[method-assign, assignment]
    instruction = client.receive(0)
    assert instruction is not None
    assert not client.bulk
    client.push(answer(instruction))
    assert grid.wait_ready({message_id}, 5) == {message_id}


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0\0\4", b"\xff" * 9, b"\0\0\0\2\xff\xff", (wire.MAX_ENVELOPE_BYTES + 1).to_bytes(4, "big")],
    ids=["empty", "cut", "huge", "noise", "over"],
)
def test_malformed_uploads_are_refused(superlink: SuperLink, tmp_path: Path, body: bytes) -> None:
    client = joined(superlink, tmp_path, "van-1")
    answered = client.connection.request("POST", wire.PUSH_PATH, body, limit=999)
    assert answered.status in (400, 413), answered.body


def test_what_was_accepted_and_not_answered_is_delivered_again(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    first, second = send(grid, client, 1), send(grid, client, 2)
    instruction = client.pull()
    assert instruction is not None
    client.push(answer(instruction))
    assert client.pull() is not None  # then the device dies
    assert not client.wait(0)
    client.activate(client.node.node_id)
    assert client.wait(0, lost=True)
    again = client.pull()
    assert again is not None
    assert {instruction.message_id, again.message_id} == {first, second}


def test_forgotten_messages_are_gone_for_the_device(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    message_id = send(grid, client)
    instruction = client.pull()
    assert instruction is not None
    grid.forget([message_id])
    client.push(answer(instruction))  # too late: accepted without effect
    assert grid.wait_ready({message_id}, 0.01) == set()
    assert rows(superlink) == (0, 0, 0)


def test_who_misses_the_deadline_is_not_asked_again_before_it_is_heard_from(
    superlink: SuperLink, tmp_path: Path
) -> None:
    grid = superlink.grid()
    slow, quick = joined(superlink, tmp_path, "slow"), joined(superlink, tmp_path, "quick")
    asked = [send(grid, slow), send(grid, quick)]
    instruction = quick.receive(0)
    assert instruction is not None
    quick.push(answer(instruction))
    assert grid.wait_ready(set(asked), 5) == {asked[1]}
    grid.forget(asked)
    assert list(grid.device_names().values()) == ["quick"]
    slow.heartbeat()
    assert sorted(grid.device_names().values()) == ["quick", "slow"]


def test_the_end_of_a_run_is_told_to_devices(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    send(grid, client)
    instruction = client.pull()
    assert instruction is not None
    grid.close(completed=True)
    with pytest.raises(Gone):
        client.push(answer(instruction))
    assert rows(superlink) == (0, 0, 0)


def test_a_run_goes_on_under_its_name_and_ends_when_it_is_closed(superlink: SuperLink, tmp_path: Path) -> None:
    client = joined(superlink, tmp_path, "van-1")
    first, other = superlink.grid("one"), superlink.grid("two")
    message_id = send(first, client)
    again = superlink.grid("one")
    assert again.run.run_id == first.run.run_id != other.run.run_id
    assert again.pending("train-1") == {message_id: client.node.node_id}
    assert superlink.store.open_runs() == ["one", "two"]
    again.close(completed=True)
    assert superlink.store.open_runs() == ["two"]
    assert rows(superlink) == (0, 0, 0)
    assert client.pull() is None
    assert superlink.grid("one").run.run_id != first.run.run_id


def test_runs_side_by_side_get_their_own_replies(superlink: SuperLink, tmp_path: Path) -> None:
    client = joined(superlink, tmp_path, "van-1")
    grids = [superlink.grid("one"), superlink.grid("two")]
    ids = [send(grid, client) for grid in grids]
    for _ in grids:
        instruction = client.receive(0)
        assert instruction is not None
        client.push(answer(instruction))
    for grid, message_id in zip(grids, ids, strict=True):
        assert grid.wait_ready(set(ids), 5) == {message_id}
        (reply,) = grid.pull_messages(ids)
        assert reply.metadata.run_id == grid.run.run_id


def test_what_is_noted_of_an_exchange_outlives_the_grid(superlink: SuperLink, tmp_path: Path) -> None:
    client, node = joined(superlink, tmp_path, "van-1"), 12345
    grid, names = superlink.grid(), {"van-0": node, "van-1": client.node.node_id}
    messages = [grid.create_message(request(1).to_record(), MessageType.TRAIN, n, "train-1") for n in names.values()]
    exchange = Exchange(group="train-1", round=1, asked=dict.fromkeys(names, ""), nodes=names, facts={"a": 1})
    sent = grid.send(exchange, messages)
    assert sent.asked["van-0"] == "", "no such node"
    again = superlink.grid()
    assert again.recall("train-1") == sent
    again.note(sent, {"a": 2}, partial=[b"su", b"ms"])
    again.note(sent, {"a": 3}, late=[sent.asked["van-1"]])
    found = superlink.grid().recall("train-1")
    assert found is not None
    assert (found.facts, found.partial, found.nodes) == ({"a": 3}, b"sums", names)
    assert again.device_names() == {}, "late: offline until it is heard from"
    again.end_rounds(1, [sent.asked["van-1"]])
    assert again.recall("train-1") is None
    assert again.pending("train-1") == {sent.asked["van-1"]: client.node.node_id}
    again.forget([sent.asked["van-1"]])
    assert rows(superlink) == (0, 0, 0)


def test_an_error_reply_made_without_flwr_arrives(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    message_id = send(grid, client)
    instruction = client.pull()
    assert instruction is not None
    client.push(wire.error_reply(instruction.envelope, "the worker died"))
    assert grid.wait_ready({message_id}, 5) == {message_id}
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.error.reason == "the worker died"


def test_an_unreadable_reply_names_its_device(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    message_id = send(grid, client)
    instruction = client.pull()
    assert instruction is not None
    good = wire.error_reply(instruction.envelope, "x")
    # A head that passes Flower's check of objects, with a body that is no message.
    content = b"Message  6\x00\xff\xff\xff\xff\xff\xff"
    name = wire.object_id(content)
    envelope = wire.message.Message.FromString(good.envelope)
    envelope.metadata.message_id = name
    tree = wire.message.ObjectTree(object_id=name).SerializeToString()
    client.push(wire.WireReply(good.run_id, good.instruction_id, envelope.SerializeToString(), tree, {name: content}))
    assert grid.wait_ready({message_id}, 5) == {message_id}
    with pytest.raises(IntegrityError, match="van-1"):
        grid.pull_messages([message_id])
    grid.forget([message_id])
    assert rows(superlink) == (0, 0, 0)


def test_an_object_that_does_not_fit_its_id_is_not_stored(superlink: SuperLink, tmp_path: Path) -> None:
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    message_id = send(grid, client)
    instruction = client.pull()
    assert instruction is not None
    reply = answer(instruction)
    name = next(iter(reply.objects))
    forged = wire.WireReply(
        reply.run_id, reply.instruction_id, reply.envelope, reply.tree, {**reply.objects, name: b"forged"}
    )
    with pytest.raises(Gone, match="does not belong"):
        client.push(forged)
    client.bulk = False
    with pytest.raises(Unreachable, match="not stored"):
        client.push(forged)
    assert grid.wait_ready({message_id}, 0.01) == set()
    client.push(reply)
    assert grid.wait_ready({message_id}, 5) == {message_id}, "the honest upload still goes through"


def test_confirming_another_device_s_message_deletes_nothing(superlink: SuperLink, tmp_path: Path) -> None:
    grid = superlink.grid()
    client, rogue = joined(superlink, tmp_path, "van-1"), joined(superlink, tmp_path, "van-2")
    message_id = send(grid, client)
    confirm = wire.message.ConfirmMessageReceivedRequest(
        node=rogue.node, run_id=grid.run.run_id, message_object_id=message_id
    )
    rogue._call("confirm-message-received", confirm, wire.message.ConfirmMessageReceivedResponse)
    assert client.pull() is not None


def test_waiting_for_devices_names_the_absent_ones(superlink: SuperLink, tmp_path: Path) -> None:
    joined(superlink, tmp_path, "van-1")
    joined(superlink, tmp_path, "van-2").deactivate()
    grid = superlink.grid()
    grid.wait_devices(1, 0)
    with pytest.raises(RefusedError) as absent:
        grid.wait_devices(2, 0.05)
    assert "1 of 2 devices are online (van-1); registered but absent: van-2" in str(absent.value)


def test_a_device_that_comes_ends_the_wait(superlink: SuperLink, tmp_path: Path) -> None:
    grid, done = superlink.grid(), threading.Event()

    def engine() -> None:
        grid.wait_devices(1, 30)
        done.set()

    threading.Thread(target=engine, daemon=True).start()
    joined(superlink, tmp_path, "van-1")
    assert done.wait(5)


def test_messages_to_a_device_that_does_not_exist_are_not_sent(superlink: SuperLink) -> None:
    grid = superlink.grid()
    message = grid.create_message(request().to_record(), MessageType.TRAIN, 12345, "train-1")
    assert grid.push_messages([message]) == [""]
    assert rows(superlink) == (0, 0, 0)


def test_stopping_ends_every_wait(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
        message_id, done = send(grid, client), threading.Event()

        def engine() -> None:
            with pytest.raises(Interrupted):
                grid.wait_ready({message_id}, 60)
            done.set()

        threading.Thread(target=engine, daemon=True).start()
    assert done.wait(5)


@pytest.mark.parametrize("seconds", [86_400.0, -86_400.0, -1.7e9], ids=["tomorrow", "yesterday", "1970"])
def test_a_reply_counts_whatever_its_device_s_clock_says(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Flower stamps a reply with the clock of its device; a store that believed it dropped the reply without a word."""
    grid, client = superlink.grid(), joined(superlink, tmp_path, "van-1")
    asked = send(grid, client)
    instruction = client.receive(10)
    assert instruction is not None
    reply = answer(instruction)
    envelope = wire.message.Message.FromString(reply.envelope)
    envelope.metadata.created_at += seconds
    envelope.metadata.ttl -= seconds
    client.push(
        wire.WireReply(reply.run_id, reply.instruction_id, envelope.SerializeToString(), reply.tree, reply.objects)
    )
    assert grid.wait_ready({asked}, 10) == {asked}
