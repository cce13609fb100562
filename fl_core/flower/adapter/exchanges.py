"""Runs by name and the exchanges of their rounds, kept in the SuperLink's own SQLite file.

They change in the same transactions as Flower's messages, so that a server that was killed finds either both or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fl_core.flower.adapter.sql import Sql

_TABLES = (
    "CREATE TABLE IF NOT EXISTS fieldfleet_runs (name TEXT PRIMARY KEY, run_id INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS fieldfleet_exchanges (run_id INTEGER NOT NULL, name TEXT NOT NULL, round INTEGER NOT NULL, "
    "asked TEXT NOT NULL, nodes TEXT NOT NULL, facts TEXT NOT NULL, partial BLOB NOT NULL, PRIMARY KEY (run_id, name))",
    # A model or two: in pieces, because SQLite and its caller hold a value whole, several times over.
    "CREATE TABLE IF NOT EXISTS fieldfleet_partials (run_id INTEGER NOT NULL, name TEXT NOT NULL, position INTEGER NOT NULL, "
    "piece BLOB NOT NULL, PRIMARY KEY (run_id, name, position))",
)
_ONE = "run_id=:r AND name=:g"
Partial = Iterable[bytes | memoryview]  # a partial result in pieces


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The instructions of one group (such as ``train-7``) and what the engine noted of their replies.

    asked: device name -> instruction id, "" where the store refused it. nodes: device name -> node id. facts: the engine's own JSON.
    partial: what is counted already, as the engine encodes it; replies counted in it are not stored any more.
    """

    group: str
    round: int
    asked: Mapping[str, str]
    nodes: Mapping[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    partial: bytes = b""


class Exchanges:
    """Every method belongs inside a transaction of the state. ``signed``: flwr's map of run ids to SQLite integers."""

    def __init__(self, sql: Sql, signed: Callable[[int], int]) -> None:
        self._query, self._signed = sql, signed
        for statement in _TABLES:
            self._query(statement)

    def runs(self) -> dict[str, int]:
        """Name -> run id, as SQLite holds it (signed)."""
        return {row["name"]: row["run_id"] for row in self._query("SELECT name, run_id FROM fieldfleet_runs")}

    def name_run(self, name: str, run_id: int) -> None:
        values = {"n": name, "r": self._signed(run_id)}
        self._query(
            "INSERT INTO fieldfleet_runs (name, run_id) VALUES (:n, :r) ON CONFLICT (name) DO UPDATE SET run_id=:r",
            values,
        )

    def forget_run(self, run_id: int) -> None:
        values = {"r": self._signed(run_id)}
        for table in ("partials", "exchanges"):
            self._query(f"DELETE FROM fieldfleet_{table} WHERE run_id=:r", values)  # noqa: S608 own names
        self._query("DELETE FROM fieldfleet_runs WHERE run_id=:r", values)

    def put(self, run_id: int, exchange: Exchange) -> None:
        values = {
            **self._key(run_id, exchange.group),
            "n": exchange.round,
            "a": json.dumps(dict(exchange.asked)),
            "d": json.dumps(dict(exchange.nodes)),
            "f": json.dumps(exchange.facts),
            "p": b"",
        }
        self._query(
            "INSERT OR REPLACE INTO fieldfleet_exchanges (run_id, name, round, asked, nodes, facts, partial) "
            "VALUES (:r, :g, :n, :a, :d, :f, :p)",
            values,
        )
        self._keep(run_id, exchange.group, [exchange.partial] if exchange.partial else [])

    def note(self, run_id: int, group: str, facts: Mapping[str, Any], partial: Partial | None) -> None:
        """New facts; the partial result stays as it is when ``partial`` is None."""
        values = {**self._key(run_id, group), "f": json.dumps(facts)}
        self._query(f"UPDATE fieldfleet_exchanges SET facts=:f WHERE {_ONE}", values)  # noqa: S608 own names
        if partial is not None:
            self._keep(run_id, group, partial)

    def _keep(self, run_id: int, group: str, partial: Partial) -> None:
        key = self._key(run_id, group)
        self._query(f"DELETE FROM fieldfleet_partials WHERE {_ONE}", key)  # noqa: S608 own names
        for position, piece in enumerate(partial):
            self._query("INSERT INTO fieldfleet_partials VALUES (:r, :g, :i, :p)", {**key, "i": position, "p": piece})

    def get(self, run_id: int, group: str) -> Exchange | None:
        rows = self._query(
            f"SELECT round, asked, nodes, facts, partial FROM fieldfleet_exchanges WHERE {_ONE}",  # noqa: S608 own names
            self._key(run_id, group),
        )
        if not rows:
            return None
        row = rows[0]
        query = f"SELECT piece FROM fieldfleet_partials WHERE {_ONE} ORDER BY position"  # noqa: S608 own names
        pieces = [found["piece"] for found in self._query(query, self._key(run_id, group))]
        return Exchange(
            group=group,
            round=int(row["round"]),
            asked=json.loads(row["asked"]),
            nodes=json.loads(row["nodes"]),
            facts=json.loads(row["facts"]),
            partial=b"".join(pieces) or bytes(row["partial"]),  # older versions kept it there
        )

    def remove(self, run_id: int, through: int) -> list[str]:
        """Drop the exchanges of all rounds up to this one; returns the ids of their instructions."""
        values = {"r": self._signed(run_id), "n": through}
        found = self._query("SELECT asked FROM fieldfleet_exchanges WHERE run_id=:r AND round<=:n", values)
        names = "(SELECT name FROM fieldfleet_exchanges WHERE run_id=:r AND round<=:n)"
        self._query(f"DELETE FROM fieldfleet_partials WHERE run_id=:r AND name IN {names}", values)  # noqa: S608 own names
        self._query("DELETE FROM fieldfleet_exchanges WHERE run_id=:r AND round<=:n", values)
        return [i for row in found for i in json.loads(row["asked"]).values() if i]

    def discard(self, run_id: int, group: str) -> list[str]:
        """Drop one exchange; returns the ids of its instructions."""
        found = self.get(run_id, group)
        for table in ("partials", "exchanges"):
            self._query(f"DELETE FROM fieldfleet_{table} WHERE {_ONE}", self._key(run_id, group))  # noqa: S608 own names
        return [i for i in found.asked.values() if i] if found else []

    def _key(self, run_id: int, group: str) -> dict[str, Any]:
        return {"r": self._signed(run_id), "g": group}


def without(ids: Iterable[str], kept: Iterable[str]) -> list[str]:
    """``ids`` less ``kept``, in order."""
    keep = set(kept)
    return [i for i in ids if i not in keep]
