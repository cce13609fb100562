"""Objects of messages in the SuperLink's SQLite file: what flwr's ObjectStore does one at a time, done for many at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fl_core.contracts.errors import IntegrityError
from fl_core.flower.adapter.messages import children_of
from fl_core.flower.adapter.sql import Sql

# ObjectStore's bookkeeping, as its own code does it row by row. A new edge counts once, whoever stored its parent.
_ADD_OBJECT = (
    "INSERT INTO objects (object_id, content, is_available, ref_count) VALUES (:id, :content, 1, 0) "
    "ON CONFLICT (object_id) DO UPDATE SET content=excluded.content, is_available=1 WHERE is_available=0"
)
_COUNT_EDGE = (
    "UPDATE objects SET ref_count=ref_count+1 WHERE object_id=:child AND NOT EXISTS "
    "(SELECT 1 FROM object_children WHERE parent_id=:parent AND child_id=:child)"
)
_FREE = "SELECT object_id FROM objects WHERE ref_count=0 AND object_id IN (SELECT value FROM json_each(:ids))"
_BATCH_BYTES = 1 << 20

# Deleting an object makes SQLite look for what refers to it: without these, by reading both tables whole.
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS fieldfleet_parents ON object_children (child_id)",
    "CREATE INDEX IF NOT EXISTS fieldfleet_runs_of ON run_objects (object_id)",
)


class Objects:
    """Every method belongs inside a transaction of the state. ``signed``: flwr's map of run ids to SQLite integers."""

    def __init__(self, sql: Sql, signed: Any) -> None:
        self._sql, self._signed = sql, signed
        for statement in _INDEXES:
            sql(statement)

    def known(self, object_ids: Iterable[str]) -> set[str]:
        """Which of these objects are stored whole."""
        query = (
            "SELECT object_id FROM objects WHERE is_available=1 AND object_id IN (SELECT value FROM json_each(:ids))"
        )
        return {row["object_id"] for row in self._sql(query, {"ids": json.dumps(list(object_ids))})}

    def read(self, object_id: str) -> bytes:
        """Its content; b"" for one that is gone or not there yet."""
        rows = self._sql("SELECT content FROM objects WHERE object_id=:i", {"i": object_id})
        return rows[0]["content"] or b"" if rows else b""

    def read_all(self, object_ids: Iterable[str]) -> dict[str, bytes]:
        """Contents of those that are there."""
        query = (
            "SELECT object_id AS i, content AS c FROM objects WHERE object_id IN (SELECT value FROM json_each(:ids))"
        )
        return {row["i"]: row["c"] for row in self._sql(query, {"ids": json.dumps(list(object_ids))}) if row["c"]}

    def add(self, run_id: int, contents: Iterable[tuple[str, bytes]], origin: str) -> None:
        """What ObjectStore.preregister and put do for one object at a time (some eight statements), for all at once."""
        run, query = self._signed(run_id), self._sql
        rows: list[dict[str, Any]] = []
        edges: list[dict[str, Any]] = []

        def flush() -> None:
            if rows:
                query(_ADD_OBJECT, rows)
                query("INSERT OR IGNORE INTO run_objects (run_id, object_id) VALUES (:run, :id)", rows)
                rows.clear()

        size = 0
        for object_id, content in contents:
            rows.append({"id": object_id, "content": content, "run": run})
            edges += [{"parent": object_id, "child": child} for child in children_of(content, origin)]
            size += len(content)
            if size > _BATCH_BYTES:
                flush()
                size = 0
        flush()
        if edges:
            if {edge["child"] for edge in edges} - self.known({edge["child"] for edge in edges}):
                raise IntegrityError(f"{origin}: it refers to objects that are not there")
            query(_COUNT_EDGE, edges)
            query("INSERT OR IGNORE INTO object_children (parent_id, child_id) VALUES (:parent, :child)", edges)

    def end_upload(self, root: str) -> None:
        """Forget an unfinished upload of this message in Flower's own calls."""
        query = "DELETE FROM object_push_sessions WHERE session_id IN "
        query += "(SELECT session_id FROM object_push_session_roots WHERE root_object_id=:m)"
        self._sql(query, {"m": root})

    def sweep(self, roots: Iterable[str]) -> None:
        """What ObjectStore.delete does for one object at a time: drop roots that nothing refers to, and what then falls."""
        query, level = self._sql, list(roots)
        while level:
            free = query(_FREE, {"ids": json.dumps(level)})
            ids = {"ids": json.dumps([row["object_id"] for row in free])}
            below = query(
                "SELECT child_id AS c FROM object_children WHERE parent_id IN (SELECT value FROM json_each(:ids))", ids
            )
            query("DELETE FROM objects WHERE object_id IN (SELECT value FROM json_each(:ids))", ids)
            if below:
                query("UPDATE objects SET ref_count=ref_count-1 WHERE object_id=:c AND ref_count>0", below)
            level = list({row["c"] for row in below})
