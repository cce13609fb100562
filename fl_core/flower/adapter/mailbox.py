"""What a device asks most often, in a few statements each: is there a message, give it to me, here is its answer.

The same rows as flwr's own handlers read and write (which stock devices go on using), without an ORM in between: with a
thousand devices these are nearly all that a server does.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from flwr.app import Message
from flwr.common.serde import message_to_proto

from fl_core.flower import wire
from fl_core.flower.adapter import steady
from fl_core.flower.adapter.sql import Sql

_INDEXES = (
    "CREATE INDEX IF NOT EXISTS fieldfleet_instructions ON message_ins (dst_node_id, delivered_at)",
    "CREATE INDEX IF NOT EXISTS fieldfleet_group ON message_ins (run_id, group_id)",
    "CREATE INDEX IF NOT EXISTS fieldfleet_replies ON message_res (run_id)",
)
_CLAIM = (
    "UPDATE message_ins SET delivered_at=:now WHERE message_id=(SELECT message_id FROM message_ins WHERE dst_node_id=:n "
    "AND delivered_at='' AND created_at+ttl>:t ORDER BY created_at, message_id LIMIT 1) RETURNING message_id"
)
_COLUMNS = (
    "message_id, group_id, run_id, src_node_id, dst_node_id, reply_to_message_id, created_at, delivered_at, ttl, "
    "message_type, content, error"
)
_CHILDREN = (
    "SELECT parent_id AS p, child_id AS c FROM object_children WHERE parent_id IN (SELECT value FROM json_each(:ids))"
)
_LOST = (
    "UPDATE message_ins SET delivered_at='' WHERE dst_node_id=:n AND delivered_at<>'' "
    "AND NOT EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id=message_ins.message_id)"
)
_RUNNING = (
    "SELECT 1 FROM run JOIN task ON task.task_id=run.primary_task_id "
    "WHERE run.run_id=:r AND task.running_at IS NOT NULL AND task.finished_at IS NULL"
)
_KNOWN = "SELECT node_id AS n FROM node WHERE status IN (:online, :offline) AND node_id IN (SELECT value FROM json_each(:ids))"
_SIGN = (
    "UPDATE node SET online_until=:until, heartbeat_interval=:seconds, "
    "last_activated_at=CASE WHEN status<>:online THEN :now ELSE last_activated_at END, status=:online "
    "WHERE node_id=:n AND status<>:gone"
)
_INSTRUCTION = "SELECT run_id, dst_node_id, created_at, ttl FROM message_ins WHERE message_id=:m"
_UNSIGNED = ("run_id", "src_node_id", "dst_node_id")


class Mailbox:
    """Every method belongs inside a transaction of the state."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        utils = importlib.import_module("flwr.server.superlink.linkstate.utils")
        self._to_dict, self._to_message = utils.message_to_dict, utils.dict_to_message
        self._validate = importlib.import_module("flwr.server.utils.validator").validate_message
        core = importlib.import_module("flwr.supercore.utils")
        self._signed, self._unsigned = core.uint64_to_int64, core.int64_to_uint64
        constant = importlib.import_module("flwr.supercore.constant")
        self._status = constant.NodeStatus
        self._patience = importlib.import_module("flwr.common.constant").HEARTBEAT_PATIENCE
        for statement in _INDEXES:
            sql(statement)

    def sign_of_life(self, node: int, seconds: float) -> None:
        values = {
            "n": self._signed(node),
            "until": steady.seconds() + self._patience * seconds,
            "seconds": seconds,
            "now": _now(),
            "online": self._status.ONLINE,
            "gone": self._status.UNREGISTERED,
        }
        self._sql(_SIGN, values)

    def waits(self, node: int, *, lost: bool) -> bool:
        """``lost``: what it accepted and did not answer waits again."""
        values = {"n": self._signed(node), "t": steady.seconds()}
        if lost:
            self._sql(_LOST, values)
        query = "SELECT 1 FROM message_ins WHERE dst_node_id=:n AND delivered_at='' AND created_at+ttl>:t LIMIT 1"
        return bool(self._sql(query, values))

    def nodes(self) -> dict[bytes, int]:
        """Public key -> node id of every node."""
        query = "SELECT public_key AS k, node_id AS n FROM node WHERE status<>:gone"
        rows = self._sql(query, {"gone": self._status.UNREGISTERED})
        return {row["k"]: int(self._unsigned(row["n"])) for row in rows}

    def online(self) -> list[int]:
        rows = self._sql("SELECT node_id AS n FROM node WHERE status=:s", {"s": self._status.ONLINE})
        return sorted(int(self._unsigned(row["n"])) for row in rows)

    def expired(self) -> bool:
        """Whether a session ended by time that still counts as online."""
        query = "SELECT 1 FROM node WHERE status=:s AND online_until<=:t LIMIT 1"
        return bool(self._sql(query, {"s": self._status.ONLINE, "t": steady.seconds()}))

    def running(self, run_id: int) -> bool:
        return bool(self._sql(_RUNNING, {"r": self._signed(run_id)}))

    def instruct(self, run_id: int, messages: Sequence[Message]) -> list[bool]:
        """Store the rows of instructions (without content) of one run; False for those to nodes that are gone."""
        if not messages or not self.running(run_id):
            return [False] * len(messages)
        nodes = {m.metadata.dst_node_id: self._signed(m.metadata.dst_node_id) for m in messages}
        names = {"online": self._status.ONLINE, "offline": self._status.OFFLINE}
        known = {row["n"] for row in self._sql(_KNOWN, {**names, "ids": json.dumps(list(nodes.values()))})}
        taken = [
            nodes[m.metadata.dst_node_id] in known and not self._validate(message=m, is_reply_message=False)
            for m in messages
        ]
        rows = [self._row(m) for m, good in zip(messages, taken, strict=True) if good]
        self._sql(_insert("message_ins", "OR IGNORE"), rows)  # the same instruction again has the same id
        return taken

    def _row(self, message: Message) -> dict[str, Any]:
        row: dict[str, Any] = self._to_dict(message)
        row.update({name: self._signed(row[name]) for name in _UNSIGNED})
        return row

    def take(self, node: int) -> tuple[bytes, list[str]]:
        """(PullMessagesResponse, ids of its objects, children first) of the next message; no ids when there is none."""
        claimed = self._sql(_CLAIM, {"n": self._signed(node), "t": steady.seconds(), "now": _now()})
        if not claimed:
            return wire.fleet.PullMessagesResponse().SerializeToString(), []
        message_id = claimed[0]["message_id"]
        if not self._sql("SELECT 1 FROM objects WHERE object_id=:m", {"m": message_id}):
            self._sql("DELETE FROM message_ins WHERE message_id=:m", {"m": message_id})
            return wire.fleet.PullMessagesResponse().SerializeToString(), []
        row = self._sql(f"SELECT {_COLUMNS} FROM message_ins WHERE message_id=:m", {"m": message_id})[0]  # noqa: S608 own names
        row.update({name: self._unsigned(row[name]) for name in _UNSIGNED})
        tree = self._tree(message_id)
        answer = wire.fleet.PullMessagesResponse(
            messages_list=[message_to_proto(self._to_message(row))], message_object_trees=[tree]
        )
        body: bytes = answer.SerializeToString()
        self._sql(
            "UPDATE run SET bytes_sent=bytes_sent+:s WHERE run_id=:r",
            {"s": len(body), "r": self._signed(row["run_id"])},
        )
        return body, wire.tree_ids(tree, origin="message")

    def _tree(self, root: str) -> Any:
        below: dict[str, list[str]] = {}
        level = [root]
        while level:
            rows = self._sql(_CHILDREN, {"ids": json.dumps(level)})
            for parent in level:
                below[parent] = []
            for row in rows:
                below[row["p"]].append(row["c"])
            level = list({row["c"] for row in rows} - below.keys())

        def tree(object_id: str) -> Any:
            return wire.message.ObjectTree(object_id=object_id, children=[tree(c) for c in below[object_id]])

        return tree(root)

    def answer(self, reply: Message) -> bool:
        """Store a reply's row; False for one that nobody waits for (any more)."""
        metadata = reply.metadata
        found = self._sql(_INSTRUCTION, {"m": metadata.reply_to_message_id})
        if not found:
            return False
        asked, expires = found[0], found[0]["created_at"] + found[0]["ttl"]
        # Our clock decides: by the device's, a reply may be from the future, or from 1970.
        metadata.created_at = steady.seconds()
        metadata.ttl = max(0.0, expires - metadata.created_at)
        if self._validate(message=reply, is_reply_message=True):
            return False
        if self._unsigned(asked["run_id"]) != metadata.run_id or expires <= steady.seconds():
            return False
        if self._unsigned(asked["dst_node_id"]) != metadata.src_node_id:
            return False
        known = self._sql(
            "SELECT message_id AS m FROM message_res WHERE reply_to_message_id=:i", {"i": metadata.reply_to_message_id}
        )
        if known:  # the same again, or a second, different one, which is dropped
            return bool(known[0]["m"] == metadata.message_id)
        self._sql(_insert("message_res"), self._row(reply))
        return True


def _insert(table: str, conflict: str = "") -> str:
    values = ", ".join(f":{name.strip()}" for name in _COLUMNS.split(","))
    return f"INSERT {conflict} INTO {table} ({_COLUMNS}) VALUES ({values})"  # noqa: S608 own names


def _now() -> str:
    return steady.now().isoformat()
