"""Store and forward: a device's records on disk, numbered, until the server itself says that it keeps them.

A broker's acknowledgement is not the server's: records stay here until ``taken``. Bounds of number, size and age drop
the oldest telemetry first; what was dropped leaves a gap in the numbers, which the server counts.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fl_core.link import batch as batches
from fl_core.link.batch import Batch, Record
from fl_core.link.outbox import unusable_outbox
from fl_core.storage import database

SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, made REAL NOT NULL, body TEXT NOT NULL,
    droppable INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS droppable_records ON records (droppable DESC, seq);
CREATE TABLE IF NOT EXISTS record_store (
    one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, dropped INTEGER NOT NULL DEFAULT 0);
"""


class RecordLog:
    """Thread-safe; one process at a time. ``max_bytes`` is of the bodies, ``hold_s`` how long telemetry may wait for company."""

    def __init__(
        self,
        path: Path,
        *,
        max_records: int = 20_000,
        max_bytes: int = 16 * 2**20,
        max_age_s: float = 30 * 86_400.0,
        hold_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_records, self._max_bytes, self._max_age = max_records, max_bytes, max_age_s
        self._hold, self._clock = hold_s, clock
        self._lock = threading.RLock()
        self._count = self._size = 0
        self._listener: Callable[[], None] | None = None
        with unusable_outbox(path):
            self._db = database.connect(path, SCHEMA)
            with self._transaction():
                self._db.execute("INSERT OR IGNORE INTO record_store (one, id) VALUES (1, ?)", (uuid.uuid4().hex,))
            self.store = self._one("SELECT id FROM record_store")
            self._measure()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """``listener`` is called, from any thread, after each new record."""
        self._listener = listener

    def append(self, kind: str, body: dict[str, Any], *, droppable: bool = False) -> int:
        """On disk when it returns. Returns the record's number. Raises IntegrityError for a body that cannot be sent."""
        text = batches.checked_body(kind, body)
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO records (kind, made, body, droppable) VALUES (?, ?, ?, ?)",
                (kind, self._clock(), text, int(droppable)),
            )
            self._count, self._size = self._count + 1, self._size + len(text)
            self._drop_old()
            while self._count > self._max_records or (self._size > self._max_bytes and self._count > 1):
                self._drop("seq = (SELECT seq FROM records ORDER BY droppable DESC, seq LIMIT 1)")
        if self._listener is not None:
            self._listener()
        return int(cursor.lastrowid or 0)

    def batch(self) -> tuple[Batch, bytes] | None:
        """The oldest records, and as they travel; None when there are none."""
        with self._transaction():
            self._drop_old()
            rows = self._db.execute(
                "SELECT seq, kind, made, body FROM records ORDER BY seq LIMIT ?", (batches.BATCH_RECORDS,)
            ).fetchall()
        if not rows:
            return None
        rows = rows[: batches.first_fitting([len(row["body"]) for row in rows])]
        records = tuple(
            Record(seq=row["seq"], kind=row["kind"], time=row["made"], body=json.loads(row["body"])) for row in rows
        )
        return batches.pack_fitting(Batch(store=self.store, records=records))

    def taken(self, store: str, upto: int) -> bool:
        """The server keeps this store's records up to this number. False where that is not about this store.

        A number that was never given out tells that this file is an older copy of itself: the server would take new
        records for old ones, so the store gets a new name.
        """
        with self._transaction():
            if store != self.store:
                return False
            last = self._one("SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'records'), 0)")
            if upto > last:
                self.store = uuid.uuid4().hex
                self._db.execute("UPDATE record_store SET id = ?", (self.store,))
                return False
            self._db.execute("DELETE FROM records WHERE seq <= ?", (upto,))
            self._measure()
        return True

    def first(self) -> int | None:
        """The number of the oldest record that waits."""
        with self._lock:
            found = self._one("SELECT MIN(seq) FROM records")
        return None if found is None else int(found)

    def due_in(self) -> float | None:
        """Seconds until something should be sent; None while nothing waits."""
        with self._lock:
            row = self._db.execute(
                "SELECT COUNT(*) AS number, MIN(made) AS oldest, MIN(droppable) AS patient FROM records"
            ).fetchone()
        if not row["number"]:
            return None
        if not row["patient"] or row["number"] >= batches.BATCH_RECORDS:
            return 0.0
        return float(min(self._hold, max(0.0, row["oldest"] + self._hold - self._clock())))  # whatever the clock does

    def depth(self) -> tuple[int, int]:
        """(records that wait, records dropped since the store was made)."""
        with self._lock:
            return self._count, int(self._one("SELECT dropped FROM record_store"))

    # inside

    def _drop_old(self) -> None:
        oldest = self._clock() - self._max_age
        if self._one("SELECT COALESCE(MIN(made), 1e300) FROM records") < oldest:
            self._drop("made < ?", oldest)

    def _drop(self, where: str, *values: Any) -> None:
        cursor = self._db.execute(f"DELETE FROM records WHERE {where}", values)  # noqa: S608 own text
        self._db.execute("UPDATE record_store SET dropped = dropped + ?", (cursor.rowcount,))
        self._measure()

    def _measure(self) -> None:
        row = self._db.execute("SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM records").fetchone()
        self._count, self._size = int(row[0]), int(row[1])

    def _one(self, query: str) -> Any:
        return self._db.execute(query).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with database.transaction(self._db, self._lock):
                yield
        except BaseException:
            with self._lock:
                self._measure()
            raise
