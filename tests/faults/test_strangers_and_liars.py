"""Wrong keys, revoked keys, noise, lies and repetitions, while an honest federation runs: it ends as if they were not there."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fl_clients.connection import ServerConnection, Unreachable, Unregistered, welcome
from fl_clients.training.fleet import FleetClient, Gone, Instruction
from fl_core.flower import adapter, wire
from fl_core.flower.adapter.messages import children
from fl_core.flower.messages import Reply, Request
from fl_core.identity import keys
from fl_core.identity.signature import sign
from tests.fault_arena import NAMES, Arena, arena
from tests.fault_table import Fault
from tests.federation import ARRAYS, connect
from tests.helpers import eventually
from tests.unit.fl_server.test_link_grid import answer

ROUNDS = 3
VICTIM = NAMES[0]


@contextlib.contextmanager
def by_hand(field: Arena, folder: Path, name: str) -> Iterator[FleetClient]:
    """A registered device that is online and speaks the protocol call by call."""
    key = keys.create_device_key(folder / f"{name}.key")
    field.superlink.registry.register(name, keys.public_pem(key))
    client = FleetClient(connect(field.superlink, key))
    client.activate(welcome(client.connection).node_id)
    yield client
    with contextlib.suppress(Gone):  # it did not answer in time and counts as offline
        client.deactivate()


def answered(field: Arena) -> set[str]:
    return set(field.superlink.store.ready(field.superlink.grid().run))


def answer_to(field: Arena, message_id: str) -> wire.WireReply:
    """A reply to this instruction, as only who has read it could make one (here: from the server's own store)."""
    store, wanted, objects = field.superlink.store, [message_id], dict[str, bytes]()
    while wanted:
        objects.update(zip(wanted, store.read_objects(wanted, 1 << 30), strict=True))
        wanted = children(objects, wanted, "store")
    asked = adapter.inflate(message_id, objects, origin="store")
    reply = Message(Reply(num_examples=1_000_000, metrics={"loss": 0.0}, arrays=ARRAYS).to_record(), reply_to=asked)
    envelope, tree, parts = adapter.deflate(reply)
    return wire.WireReply(field.superlink.grid().run.run_id, message_id, envelope, tree, parts)


def held_round(field: Arena, *names: str) -> None:
    """Round 2 is under way, and these devices are training until they are let go."""
    field.after[1] = lambda: [field.device(name).switch("hold", True) for name in names]  # type: ignore[assignment,return-value]
    field.begin(ROUNDS, "algorithm.min_clients=1")
    eventually(lambda: all(2 in field.device(name).seen() for name in names), 60)


def release(field: Arena) -> None:
    for device in field.devices:
        device.switch("hold", False)


def test_a_key_that_is_not_registered(fault: Fault, tmp_path: Path) -> None:
    fault.about("wrong key", "every call, in mid-round", "401 each time; a reply in another's name does not count")
    with arena(tmp_path) as field:
        held_round(field, *NAMES)
        stranger = connect(field.superlink, keys.create_device_key(tmp_path / "stranger.key"))
        node = wire.Node(node_id=next(iter(field.superlink.directory.names())))
        body = wire.fleet.PullMessagesRequest(node=node).SerializeToString()
        paths = ["activate-node", "pull-messages", "push-messages", "push-object", "pull-object", "get-run"]
        for path in [*(wire.FLEET_PATH + name for name in paths), wire.WAIT_PATH, wire.PULL_PATH, wire.PUSH_PATH]:
            assert stranger.request("POST", path, body, limit=1 << 20).status == 401, path
        with pytest.raises(Unregistered, match="not registered"):
            welcome(stranger)
        release(field)
        field.finish()
        field.check_model()
        field.check_trained()


@pytest.mark.slow
def test_a_registered_device_that_answers_for_another(fault: Fault, tmp_path: Path) -> None:
    fault.about("wrong key", "a device answers for another", "refused; the other's own reply counts")
    with arena(tmp_path) as field:
        held_round(field, VICTIM)
        with by_hand(field, tmp_path, "thief") as thief:
            own = thief.node
            names = {name: node for node, name in field.superlink.directory.names().items()}
            thief.node = wire.Node(node_id=names[VICTIM])
            with pytest.raises((Gone, Unregistered)):
                thief.receive(0)
            thief.node = own
            assert thief.receive(0) is None, "nothing waits for it"
            (asked,) = field.superlink.store.pending(field.superlink.grid().run, "train-2").keys() - answered(field)
            forged = answer_to(field, asked)
            for node in (own, wire.Node(node_id=names[VICTIM])):
                thief.node = node
                with pytest.raises((Gone, Unregistered, Unreachable)):
                    thief.push(forged)
            thief.node = own
        release(field)
        field.finish()
        field.check_model()
        field.check_trained()


def test_revoked_in_mid_round_before_it_answers(fault: Fault, tmp_path: Path) -> None:
    fault.about("revoked key", "training", "refused at once, nobody waits for it; registered again it is back")
    with arena(tmp_path) as field:
        other = field.device(NAMES[1])
        held_round(field, VICTIM)
        field.superlink.registry.revoke(VICTIM)
        field.superlink.bell.ring_engine()  # as a running server does when its registry changes
        field.after[2] = lambda: other.switch("hold", True)
        record = field.wait_round(2)
        assert record.seconds < 60, "nobody waits for it until the deadline"
        assert list(record.clients) == [NAMES[1]]
        assert "revoked" in record.refused[VICTIM]
        field.device(VICTIM).switch("hold", False)
        eventually(lambda: any("revoked" in str(facts) for event, facts in field.device(VICTIM).events), 60)
        field.superlink.registry.register(VICTIM, keys.public_pem(field.device(VICTIM).key))
        with fault.recovery():
            eventually(lambda: VICTIM in field.superlink.grid().device_names().values(), 90)
        release(field)
        field.finish()
        assert field.device(VICTIM).process.poll() is None  # type: ignore[union-attr]
        field.check_model([NAMES, NAMES[1:], field.records[2].clients])  # type: ignore[list-item]


def test_revoked_in_mid_round_after_it_answered(fault: Fault, tmp_path: Path) -> None:
    fault.about("revoked key", "its reply lies in the server", "refused with 'revoked', at once, and not counted")
    with arena(tmp_path, names=("b-1", "a-22")) as field:  # in the order of names the held one is looked at first
        held, revoked = "a-22", "b-1"
        held_round(field, held)
        eventually(lambda: [e for e, _ in field.device(revoked).events].count("reply") == 2, 60)
        field.superlink.registry.revoke(revoked)
        release(field)
        record = field.wait_round(2)
        assert list(record.clients) == [held]
        assert "revoked" in record.refused[revoked]
        field.finish()
        assert field.records[2].skipped or revoked not in field.records[2].clients
        field.check_model([["b-1", "a-22"], [held], [held]])


def test_duplicated_and_reordered_replies(fault: Fault, tmp_path: Path) -> None:
    """A device of its own making sends each reply three times, an older one between, and another one for the same."""
    fault.about(
        "duplicates, reordering",
        "replies sent again, late and changed",
        "the first counts, once; the rest changes nothing",
    )
    with arena(tmp_path) as field, by_hand(field, tmp_path, "double") as client:
        field.begin(ROUNDS)
        old: Instruction | None = None
        for _ in range(ROUNDS):
            instruction = eventually(lambda: client.receive(5), 60)
            asked = adapter.inflate(instruction.message_id, dict(instruction.objects), origin="server")
            found = Request.from_record(asked.content, origin="server")
            first = answer(instruction)
            second = answer(instruction, {name: np.asarray(array) + 5 for name, array in found.arrays.items()})
            client.push(first)
            for again in [first, *([answer(old)] if old else []), second, first]:
                try:
                    client.push(again)
                except Gone:
                    continue
            old = instruction
        field.finish()
        field.check_model([[*NAMES, "double"]] * ROUNDS, {"double": (1.0, 3)})
        field.check_trained()


NOISE = {
    "not protobuf": b"\xff" * 300,
    "a huge record announced": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 100,
    "empty": b"",
    "text": b"POST / HTTP/1.1\r\n\r\n" * 50,
}


@pytest.mark.parametrize(
    "kind", ["noise in every call", pytest.param("endless and oversized bodies", marks=pytest.mark.slow)]
)
def test_malformed_and_oversized_requests(fault: Fault, tmp_path: Path, kind: str) -> None:
    fault.about("malformed messages", kind, "refused or hung up on; the federation goes on undisturbed")
    with arena(tmp_path) as field:
        key = keys.create_device_key(tmp_path / "liar.key")
        field.superlink.registry.register("liar", keys.public_pem(key))
        connection = connect(field.superlink, key)
        held_round(field, VICTIM)
        if kind.startswith("noise"):
            names = ["activate-node", "pull-messages", "push-messages", "push-object", "confirm-message-received"]
            for path in [*(wire.FLEET_PATH + n for n in names), wire.WAIT_PATH, wire.PULL_PATH, wire.PUSH_PATH]:
                for body in NOISE.values():
                    status = noisy(connection, path, body)
                    assert 400 <= status < 500 or status == 503 or (not body and status in (200, 204)), (path, body)
        else:
            for path in (wire.FLEET_PATH + "push-messages", wire.WAIT_PATH, wire.PUSH_PATH):
                assert endless(field, key, path) in (400, 413, 503, 0), path
        release(field)
        field.finish()
        field.check_model()
        field.check_trained()


def noisy(connection: ServerConnection, path: str, body: bytes) -> int:
    """The answer's status; 503 for what a device should send again (a reply whose objects are missing)."""
    try:
        return connection.request("POST", path, body, limit=1 << 20).status
    except Unreachable:
        welcome(connection)  # it lives
        return 503


def endless(field: Arena, key: keys.PrivateKey, path: str) -> int:
    """The status with which 600 MB of chunks are refused; 0 = the server hung up on them."""
    context = ssl.create_default_context(cafile=str(field.superlink.home.ca_file))
    http_connection = http.client.HTTPSConnection("127.0.0.1", field.superlink.port, timeout=60, context=context)
    piece = b"\x00" * (1 << 20)
    try:
        http_connection.request("POST", path, (piece for _ in range(600)), sign(key), encode_chunked=True)
        return http_connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        http_connection.close()


def test_lies(fault: Fault, tmp_path: Path) -> None:
    fault.about(
        "poisoned replies", "not finite, other shapes, other names", "refused with the reason; honest ones count"
    )
    lies: list[dict[str, np.ndarray]] = [
        {name: np.full_like(array, np.nan) for name, array in ARRAYS.items()},
        {name: np.zeros(7, array.dtype) for name, array in ARRAYS.items()},
        {"others": np.zeros(3, np.float32)},
    ]
    with arena(tmp_path) as field, by_hand(field, tmp_path, "liar") as client:
        field.begin(ROUNDS)
        for arrays in lies:
            client.push(answer(eventually(lambda: client.receive(5), 60), arrays))
        records = field.finish()
        assert all("liar" in record.refused["liar"] for record in records), [record.refused for record in records]
        field.check_model([NAMES] * ROUNDS)
        field.check_trained()


@pytest.mark.slow
def test_connections_that_say_nothing(fault: Fault, tmp_path: Path) -> None:
    fault.about("malformed messages", "200 connections that never speak TLS", "the federation goes on undisturbed")
    with arena(tmp_path) as field:
        quiet = [socket.create_connection(("127.0.0.1", field.superlink.port)) for _ in range(200)]
        try:
            for number, found in enumerate(quiet):
                if number % 2:
                    found.sendall(b"\x16\x03\x01\x02\x00noise" * 10)
            field.begin(ROUNDS)
            field.finish()
            field.check_model()
            field.check_trained()
        finally:
            for found in quiet:
                found.close()
