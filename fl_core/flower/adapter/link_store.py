"""LinkStore: the SuperLink's state and object store behind one lock, in one SQLite file."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.run import Run

from fl_core.contracts.errors import EnvironmentFault, IntegrityError
from fl_core.flower import wire
from fl_core.flower.adapter import stock
from fl_core.flower.adapter.exchanges import Exchange, Exchanges, Partial, without
from fl_core.flower.adapter.fleet_api import FleetAnswer, FleetApi
from fl_core.flower.adapter.mailbox import Mailbox
from fl_core.flower.adapter.messages import assume_identity, children, inflate, set_message_id, stamp
from fl_core.flower.adapter.objects import Objects
from fl_core.flower.adapter.opening import load_modules, open_state
from fl_core.flower.adapter.sql import Sql
from fl_core.flower.adapter.stock import store_bundle
from fl_core.flower.wire import FleetRefused
from fl_core.storage import atomic

HEARTBEAT_SECONDS = 30.0


class LinkStore:
    """The embedded SuperLink's state. Every method is one transaction under one lock, so SQLite is never found locked.

    Node ids are Flower's unsigned 64-bit integers; keys are PEM public keys.
    """

    def __init__(self, database: Path) -> None:
        self._m = load_modules()
        self._file, self._state = database, open_state(database)
        self._store = self._state.object_store
        self._lock = threading.RLock()
        signed = self._m.utils.uint64_to_int64
        self._sql = Sql(self._state)
        with self.together():
            self._objects, self._exchanges = Objects(self._sql, signed), Exchanges(self._sql, signed)
            self._mailbox = Mailbox(self._sql)
        self._ready: dict[int, dict[str, str]] = {}  # by run, of what ``ready`` was asked for
        self._api = FleetApi(self._m, self._state)

    # Devices

    def enrol(self, public_pem: bytes) -> int:
        """The node id of a key, made on first sight."""
        constant = self._m.constant
        with self.together():
            known = self._state.get_node_id_by_public_key(public_pem)
            return int(
                known
                or self._state.create_node(
                    constant.NOOP_FLWR_AID, constant.NOOP_ACCOUNT_NAME, public_pem, HEARTBEAT_SECONDS
                )
            )

    def enrol_all(self, public_pems: Iterable[bytes]) -> dict[bytes, int]:
        """``enrol`` of many keys as one transaction."""
        with self.together():
            known = self._mailbox.nodes()
            return {pem: known.get(pem) or self.enrol(pem) for pem in public_pems}

    def online(self) -> list[int]:
        with self.together():
            if self._mailbox.expired():
                self._state.get_node_info(node_ids=[0])  # flwr marks them as offline
            return self._mailbox.online()

    def sign_of_life(self, node: int, seconds: float) -> None:
        """Flower counts a node as online for twice its interval."""
        with self.together():
            self._mailbox.sign_of_life(node, max(seconds, HEARTBEAT_SECONDS))

    def deactivate(self, node: int) -> None:
        with self.together():
            self._state.deactivate_node(node)

    def waiting(self) -> int:
        """How many instructions no device has fetched yet."""
        with self.together():
            return int(self._state.query("SELECT COUNT(*) AS n FROM message_ins WHERE delivered_at=''", {})[0]["n"])

    def undelivered(self, node: int, *, lost: bool = False) -> bool:
        """Whether a message waits for this node. ``lost``: what it accepted and did not answer waits again."""
        with self.together():
            return self._mailbox.waits(node, lost=lost)

    def take(self, node: int) -> tuple[bytes, list[str]]:
        """(PullMessagesResponse, ids of its objects, children first) of the next message; no ids when there is none."""
        with self.together():
            return self._mailbox.take(node)

    # Runs

    def open_run(self, name: str) -> Run:
        """The run of this name where it stood, or a new one; it is running and never expires."""
        state, constant, core = self._state, self._m.constant, self._m.core_constant
        with self.together():
            run = self._running(name)
            if run is None:
                run_id = state.create_run(
                    *store_bundle(state),
                    {},
                    core.NOOP_FEDERATION_ID,
                    None,
                    constant.NOOP_FLWR_AID,
                    core.TaskType.SERVER_APP,
                )
                task = state.get_run_info(run_ids=[run_id])[0].primary_task_id
                if not state.claim_task(task) or not state.activate_task(task):
                    raise IntegrityError("the SuperLink's new run could not be started")
                query = (
                    "UPDATE task SET token=NULL, active_until=NULL WHERE task_id=:t"  # else it fails without heartbeats
                )
                state.query(query, {"t": self._m.utils.uint64_to_int64(task)})
                self._exchanges.name_run(name, run_id)
                run = state.get_run_info(run_ids=[run_id])[0]
        assume_identity(run_id=run.run_id, task_id=run.primary_task_id, node_id=SUPERLINK_NODE_ID)
        return run

    def open_runs(self) -> list[str]:
        """Names of the runs that go on at ``open_run``."""
        with self.together():
            return sorted(name for name in self._exchanges.runs() if self._running(name) is not None)

    def _running(self, name: str) -> Run | None:
        run_id = self._exchanges.runs().get(name)
        if run_id is None:
            return None
        found: list[Run] = self._state.get_run_info(
            run_ids=[self._m.utils.int64_to_uint64(run_id)], statuses=[self._m.constant.Status.RUNNING]
        )
        return found[0] if found else None

    def close_run(self, run: Run, *, completed: bool) -> None:
        """The end of a run: nothing of it stays but its entry in Flower's list."""
        sub_status = self._m.constant.SubStatus
        with self.together():
            self._state.finish_task(run.primary_task_id, sub_status.COMPLETED if completed else sub_status.STOPPED, "")
            self._state.cleanup_run(run.run_id)
            self._exchanges.forget_run(run.run_id)
            self._ready.pop(run.run_id, None)

    # Messages

    def push(self, run: Run, messages: Iterable[Message], exchange: Exchange | None = None) -> list[str | None]:
        """Messages and all their objects in one transaction; None for a message that the store refuses (node gone).

        With them ``exchange``, whose ``asked`` names one device a message; it gets their ids.
        """
        ids: list[str | None] = []
        with self.together(), no_object_id_recompute():
            sent = list(messages)
            for message in sent:
                stamp(message, run_id=run.run_id, task_id=run.primary_task_id, node_id=SUPERLINK_NODE_ID)
                set_message_id(message, message.object_id)
            taken = self._mailbox.instruct(run.run_id, [remove_content_from_message(m) for m in sent])
            for message, good in zip(sent, taken, strict=True):
                if good:
                    objects = get_all_nested_objects(message)
                    missing = objects.keys() - self._objects.known(objects)
                    contents = ((i, objects[i].deflate()) for i in objects if i in missing)
                    self._objects.add(run.run_id, contents, "message")
                ids.append(message.object_id if good else None)
            if exchange is not None:
                asked = {name: i or "" for name, i in zip(exchange.asked, ids, strict=True)}
                self._exchanges.put(run.run_id, replace(exchange, asked=asked))
        return ids

    def exchange(self, run: Run, group: str) -> Exchange | None:
        """What was noted of this group, or None when it was never sent."""
        with self.together():
            return self._exchanges.get(run.run_id, group)

    def note(
        self,
        run: Run,
        group: str,
        facts: Mapping[str, Any],
        *,
        partial: Partial | None = None,
        forget: Iterable[str] = (),
    ) -> None:
        """What came of an exchange so far, and in the same transaction the end of what it needs no longer."""
        with self.together():
            self._exchanges.note(run.run_id, group, facts, partial)
            self.forget(forget, self.ready(run))

    def end_rounds(self, run: Run, through: int, kept: Iterable[str]) -> None:
        """Drop every exchange up to this round, and their messages but the ``kept`` instructions."""
        with self.together():
            self.forget(without(self._exchanges.remove(run.run_id, through), kept), self.ready(run))

    def discard(self, run: Run, group: str) -> None:
        """Drop one exchange and its messages."""
        with self.together():
            self.forget(self._exchanges.discard(run.run_id, group), self.ready(run))

    def accept(self, request: bytes, contents: Iterable[tuple[str, bytes]], node: int, public_pem: bytes) -> None:
        """A whole reply: a PushMessagesRequest and every object of its tree (id, content), in one transaction.

        Its instruction is confirmed with it. A reply to what was forgotten meanwhile is dropped. Raises FleetRefused.
        """
        found = self._api.parse("push-messages", request, node, public_pem)
        reply = message_from_proto(found.messages_list[0])
        run_id, message_id = reply.metadata.run_id, reply.metadata.message_id
        with self._lock:
            with self.together():
                if not self._mailbox.running(run_id):
                    raise FleetRefused(403, "the run is over")
                if not self._mailbox.answer(reply):
                    return
                self._objects.end_upload(message_id)  # of it in Flower's calls, cut off
                try:
                    self._objects.add(run_id, contents, "reply")
                except IntegrityError as error:
                    raise FleetRefused(400, error.message) from None
                self._objects.sweep([reply.metadata.reply_to_message_id])
            if run_id in self._ready:
                self._ready[run_id].setdefault(reply.metadata.reply_to_message_id, message_id)

    def ready(self, run: Run, only: Iterable[str] | None = None) -> dict[str, str]:
        """instruction id -> reply id, of replies whose objects are all there, in the order of their arrival (or of ``only``).

        Asked for once a reply: listed from the store only after something else than ``accept`` changed it, so that a
        round does not cost the square of its devices.
        """
        query = (
            "SELECT reply_to_message_id AS i, message_id AS m FROM message_res WHERE run_id=:r AND message_id NOT IN "
            "(SELECT root_object_id FROM object_push_session_roots JOIN object_push_sessions USING (session_id) "
            "WHERE pending_count>0) ORDER BY rowid"
        )
        with self._lock:
            if run.run_id not in self._ready:
                with self.together():
                    rows = self._sql(query, {"r": self._m.utils.uint64_to_int64(run.run_id)})
                self._ready[run.run_id] = {row["i"]: row["m"] for row in rows}
            found = self._ready[run.run_id]
            return dict(found) if only is None else {i: found[i] for i in only if i in found}

    def upload_done(self, session_id: str) -> bool:
        """Whether nothing is awaited any more in a push session (flwr removes it with its last object)."""
        query = "SELECT 1 FROM object_push_sessions WHERE session_id=:s AND pending_count>0"
        with self.together():
            return not self._sql(query, {"s": session_id})

    def read_objects(self, object_ids: Iterable[str], at_most: int) -> list[bytes]:
        """Contents of the first of these objects, until ``at_most`` bytes are reached; b"" for one that is gone."""
        found, size = list[bytes](), 0
        with self.together():
            for object_id in object_ids:
                found.append(self._objects.read(object_id))
                size += len(found[-1])
                if size >= at_most:
                    break
        return found

    def load(self, message_id: str, *, origin: str) -> Message:
        """Read a stored message whole. Raises IntegrityError when it is not readable or an object is missing."""
        contents: dict[str, bytes] = {}
        wanted = [message_id]
        with self.together():
            while wanted:
                contents.update(self._objects.read_all(wanted))
                for object_id in wanted:
                    if object_id not in contents:
                        raise IntegrityError(f"{origin}: object {object_id[:16]} of the message is missing")
                if len(contents) > wire.MAX_OBJECTS:
                    raise IntegrityError(f"{origin}: more than {wire.MAX_OBJECTS} objects in one message")
                wanted = children(contents, wanted, origin)
        return inflate(message_id, contents, origin=origin)

    def forget(self, message_ids: Iterable[str], ready: Mapping[str, str]) -> None:
        """Drop instructions, their replies and the objects of both."""
        ids = set(message_ids)
        if not ids:
            return
        with self.together():
            self._objects.sweep([*ids, *(ready[i] for i in ids if i in ready)])
            self._state.delete_messages(ids)
            self._ready.clear()

    def pending(self, run: Run, group: str) -> dict[str, int]:
        """instruction id -> node id of what one group (a round) still holds in the store."""
        query = "SELECT message_id AS m, dst_node_id AS n FROM message_ins WHERE run_id=:r AND group_id=:g"
        with self.together():
            rows = self._sql(query, {"r": self._m.utils.uint64_to_int64(run.run_id), "g": group})
        return {row["m"]: int(self._m.utils.int64_to_uint64(row["n"])) for row in rows}

    def listing(self, name: str, body: bytes) -> bytes | None:
        """Flower's Control API, as far as it lists: ``list-runs`` and ``list-nodes``; None for every other call."""
        try:
            with self.together():
                return stock.listing(self._state, name, body)
        except self._m.errors.FlowerError as error:
            spec = self._m.catalog.API_ERROR_MAP[error.code]
            raise FleetRefused(spec.http_status_code, spec.public_message) from None
        except Exception as error:  # protobuf's DecodeError, whichever implementation is loaded
            raise FleetRefused(400, f"not a readable {name} request: {type(error).__name__}") from None

    # Flower's Fleet API

    def fleet(self, name: str, body: bytes, node: int, public_pem: bytes) -> FleetAnswer:
        """Answer one Fleet call of an authenticated node.

        Raises FleetRefused with the HTTP status that Flower documents for it. A node speaks for itself only.
        """
        request = self._api.parse(name, body, node, public_pem)
        response = self._api.answer(name, request, self.together)
        session = getattr(response if name == "push-messages" else request, "session_id", "")
        complete = bool(session) and self.upload_done(session)
        if complete or name == "push-messages":
            with self._lock:
                self._ready.clear()
        return FleetAnswer(response.SerializeToString(), complete)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Several calls as one transaction: all of them take effect, or none. Raises EnvironmentFault on a full disk."""
        try:
            with self._lock, self._state.session():
                yield
        except self._m.sqlalchemy_errors.OperationalError as error:
            if "disk is full" not in str(error.orig):
                raise
            raise EnvironmentFault(f"{self._file}: {error.orig}", remedy=atomic.NO_SPACE_REMEDY) from None
