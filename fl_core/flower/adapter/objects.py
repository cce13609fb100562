"""Objects of messages in the SuperLink's SQLite file: what flwr's ObjectStore does one at a time, done for many at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fl_core.contracts.errors import IntegrityError
from fl_core.flower.adapter.messages import children_of
from fl_core.flower.adapter.sql import Sql

# ObjectStore's bookkeeping, as its own code does it row by row. A new edge counts once, whoever stored its parent.
# SQLite writes a row anew, content and all, when its count changes. So new objects come with the count that nearly all of
# them end with (one parent), and what loses its last parent is deleted without being counted down first.
_USUAL = 1
_ADD_OBJECT = (
    "INSERT INTO objects (object_id, content, is_available, ref_count) VALUES (:id, :content, 1, :count) "
    "ON CONFLICT (object_id) DO UPDATE SET content=excluded.content, is_available=1 WHERE is_available=0"
)
_STORED = "SELECT object_id AS i, ref_count AS n FROM objects WHERE object_id IN (SELECT value FROM json_each(:ids))"
_EDGES = (
    "SELECT parent_id AS p, child_id AS c FROM object_children WHERE parent_id IN (SELECT value FROM json_each(:ids))"
)
_COUNT = "UPDATE objects SET ref_count=ref_count+:n WHERE object_id=:i"
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
        stored, edges = set[str](), set[tuple[str, str]]()
        added = dict[str, None]()

        def flush() -> None:
            before = self._counts([row["id"] for row in rows])
            stored.update(before)
            for row in rows:
                row["count"] = 0 if row["id"] in before else _USUAL
            query(_ADD_OBJECT, rows)
            query("INSERT OR IGNORE INTO run_objects (run_id, object_id) VALUES (:run, :id)", rows)
            rows.clear()

        size = 0
        for object_id, content in contents:
            if object_id in added:
                continue
            added[object_id] = None
            rows.append({"id": object_id, "content": content, "run": run})
            edges.update((object_id, child) for child in children_of(content, origin))
            size += len(content)
            if size > _BATCH_BYTES:
                flush()
                size = 0
        flush()
        children = {child for _, child in edges}
        if children - self.known(children):
            raise IntegrityError(f"{origin}: it refers to objects that are not there")
        edges.difference_update((row["p"], row["c"]) for row in query(_EDGES, {"ids": json.dumps(list(stored))}))
        counts = Counter(child for _, child in edges)
        changes = {i: counts[i] - (_USUAL if i in added and i not in stored else 0) for i in {*added, *counts}}
        query(_COUNT, [{"i": i, "n": n} for i, n in changes.items() if n])
        pairs = [{"parent": parent, "child": child} for parent, child in edges]
        query("INSERT OR IGNORE INTO object_children (parent_id, child_id) VALUES (:parent, :child)", pairs)

    def _counts(self, object_ids: list[str]) -> dict[str, int]:
        """How many objects refer to each of these; those that are not stored, nor announced, are left out."""
        return {row["i"]: row["n"] for row in self._sql(_STORED, {"ids": json.dumps(object_ids)})}

    def end_upload(self, root: str) -> None:
        """Forget an unfinished upload of this message in Flower's own calls."""
        query = "DELETE FROM object_push_sessions WHERE session_id IN "
        query += "(SELECT session_id FROM object_push_session_roots WHERE root_object_id=:m)"
        self._sql(query, {"m": root})

    def sweep(self, roots: Iterable[str]) -> None:
        """What ObjectStore.delete does for one object at a time: drop roots that nothing refers to, and what then falls."""
        query, free = self._sql, [i for i, n in self._counts(list(roots)).items() if n == 0]
        while free:
            ids = {"ids": json.dumps(free)}
            below = Counter(row["c"] for row in query(_EDGES, ids))
            query("DELETE FROM objects WHERE object_id IN (SELECT value FROM json_each(:ids))", ids)
            left = {i: n - below[i] for i, n in self._counts(list(below)).items()}
            free = [i for i, n in left.items() if n <= 0]
            query(_COUNT, [{"i": i, "n": -below[i]} for i, n in left.items() if n > 0])
