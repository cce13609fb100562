"""What devices tell: an append-only table that holds each record once, in order, behind a cursor that only grows.

(device, store, number) names a record; what was taken before is not taken again, however often it arrives. A gap in a
store's numbers is what its device dropped (its limits of size and age): counted as ``missing``. Readers keep a cursor;
what the server's own limits removed before a reader came is counted as ``expired``.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts.names import checked_name
from fl_core.link.batch import Batch, Record
from fl_core.link.envelope import Envelope
from fl_core.storage import database

SCHEMA = """
CREATE TABLE IF NOT EXISTS telemetry (
    cursor INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, id TEXT NOT NULL, seq INTEGER NOT NULL,
    kind TEXT NOT NULL, time REAL NOT NULL, received REAL NOT NULL, body TEXT NOT NULL, UNIQUE (device, id));
CREATE INDEX IF NOT EXISTS telemetry_of_device ON telemetry (device, cursor);
CREATE TABLE IF NOT EXISTS telemetry_stores (
    device TEXT NOT NULL, store TEXT NOT NULL, taken INTEGER NOT NULL, missing INTEGER NOT NULL, first_seen REAL NOT NULL,
    PRIMARY KEY (device, store));
CREATE TABLE IF NOT EXISTS telemetry_readers (name TEXT PRIMARY KEY, cursor INTEGER NOT NULL, changed REAL NOT NULL);
"""
MAX_STORES = 20  # of one device: it makes a new one when its disk was wiped
PAGE = 500


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One record as its readers see it. cursor: ascends over all devices. seq: the device's own number; 0 = has none."""

    cursor: int
    device: str
    kind: str
    seq: int
    time: float
    received: float
    body: dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """upto: the number of the last record that is kept. fresh: those of the batch that were new."""

    upto: int
    fresh: tuple[Record, ...]


class Telemetry:
    """Thread-safe; other processes may read the same file at the same time."""

    def __init__(self, path: Path, *, max_per_device: int = 10_000, max_age_s: float = 90 * 86_400.0) -> None:
        self._max_per_device, self._max_age = max_per_device, max_age_s
        self._lock = threading.RLock()
        self._db = database.connect(path, SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # from devices

    def take(self, device: str, batch: Batch) -> Taken:
        """Keep what is new of a batch, in one transaction: durable when it returns, which is what may be acknowledged."""
        now = time.time()
        with self._transaction():
            row = self._db.execute(
                "SELECT taken FROM telemetry_stores WHERE device = ? AND store = ?", (device, batch.store)
            ).fetchone()
            known = row["taken"] if row else 0
            fresh = tuple(record for record in batch.records if record.seq > known)
            upto = max(known, batch.records[-1].seq)
            for record in fresh:
                self._insert(device, f"{batch.store}/{record.seq}", record, now)
            self._db.execute(
                "INSERT INTO telemetry_stores (device, store, taken, missing, first_seen) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (device, store) DO UPDATE SET taken = excluded.taken, missing = missing + excluded.missing",
                (device, batch.store, upto, upto - known - len(fresh), now),
            )
            if row is None:
                self._forget_old_stores(device)
            self._expire(device, now)
        return Taken(upto, fresh)

    def take_report(self, device: str, message: Envelope) -> bool:
        """A single report, as other programs and older devices send it: known by its id while it is kept. False for one seen before."""
        record = Record(seq=0, kind=message.type, time=message.time, body=message.body)
        now = time.time()
        with self._transaction():
            new = self._insert(device, f"{message.type}/{message.id}", record, now)
            self._expire(device, now)
        return new

    # for readers

    def read(self, *, since: int = 0, device: str = "", kind: str = "", limit: int = PAGE) -> list[Entry]:
        """Entries after the cursor ``since``, in the order of arrival; each device's in the order it made them."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM telemetry WHERE cursor > ? AND (? = '' OR device = ?) AND (? = '' OR kind = ?) "
                "ORDER BY cursor LIMIT ?",
                (since, device, device, kind, kind, limit),
            ).fetchall()
        return [_entry(row) for row in rows]

    def latest(self, device: str, kind: str = "", *, limit: int = 100) -> list[dict[str, Any]]:
        """Bodies with their type and time, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM telemetry WHERE device = ? AND (? = '' OR kind = ?) ORDER BY cursor DESC LIMIT ?",
                (device, kind, kind, limit),
            ).fetchall()
        return [{**json.loads(row["body"]), "type": row["kind"], "time": row["time"]} for row in rows]

    def missing(self) -> dict[str, int]:
        """Device -> records that it made and dropped before they could be delivered."""
        with self._lock:
            rows = self._db.execute(
                "SELECT device, SUM(missing) AS missing FROM telemetry_stores GROUP BY device ORDER BY device"
            ).fetchall()
        return {row["device"]: row["missing"] for row in rows}

    def expired(self, *, since: int, until: int) -> int:
        """How many entries with a cursor in (since, until] were removed by this server's limits: cursors have no gaps."""
        with self._lock:
            kept = self._db.execute(
                "SELECT COUNT(*) FROM telemetry WHERE cursor > ? AND cursor <= ?", (since, until)
            ).fetchone()[0]
        return max(0, until - since) - int(kept)

    def last(self) -> int:
        """The cursor of the newest entry that ever was."""
        with self._lock:
            row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'telemetry'").fetchone()
        return int(row["seq"]) if row else 0

    def reader(self, name: str) -> Reader:
        """A named place in the table that outlives its program. Raises InputError for an unusable name."""
        return Reader(self, checked_name(name, "reader"))

    def place_of(self, reader: str) -> int:
        with self._lock:
            row = self._db.execute("SELECT cursor FROM telemetry_readers WHERE name = ?", (reader,)).fetchone()
        return int(row["cursor"]) if row else 0

    def move(self, reader: str, cursor: int) -> None:
        with self._transaction():
            self._db.execute(
                "INSERT INTO telemetry_readers (name, cursor, changed) VALUES (?, ?, ?) ON CONFLICT (name) "
                "DO UPDATE SET cursor = MAX(cursor, excluded.cursor), changed = excluded.changed",
                (reader, cursor, time.time()),
            )

    # inside

    def _insert(self, device: str, name: str, record: Record, now: float) -> bool:
        body = json.dumps(record.body, separators=(",", ":"))
        if self._db.execute("SELECT 1 FROM telemetry WHERE device = ? AND id = ?", (device, name)).fetchone():
            return False  # asked first: an insertion that is ignored would use up a cursor
        self._db.execute(
            "INSERT INTO telemetry (device, id, seq, kind, time, received, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (device, name, record.seq, record.kind, record.time, now, body),
        )
        return True

    def _expire(self, device: str, now: float) -> None:
        self._db.execute(  # a few of anybody's, each time: also those of devices that are gone
            "DELETE FROM telemetry WHERE cursor IN (SELECT cursor FROM telemetry ORDER BY cursor LIMIT ?) AND received < ?",
            (PAGE, now - self._max_age),
        )
        self._db.execute(
            "DELETE FROM telemetry WHERE device = ? AND cursor <= COALESCE("
            "(SELECT cursor FROM telemetry WHERE device = ? ORDER BY cursor DESC LIMIT 1 OFFSET ?), -1)",
            (device, device, self._max_per_device),
        )

    def _forget_old_stores(self, device: str) -> None:
        self._db.execute(
            "DELETE FROM telemetry_stores WHERE device = ? AND store NOT IN "
            "(SELECT store FROM telemetry_stores WHERE device = ? ORDER BY rowid DESC LIMIT ?)",
            (device, device, MAX_STORES),
        )

    def _transaction(self) -> AbstractContextManager[None]:
        return database.transaction(self._db, self._lock)


class Reader:
    """``for entry in reader: ...; reader.commit()``: what was committed is never seen again, what was not, is seen again.

    expired: entries that the server's limits removed before this reader came to them.
    """

    def __init__(self, telemetry: Telemetry, name: str) -> None:
        self._telemetry, self.name = telemetry, name
        self.cursor = self._telemetry.place_of(name)
        self.expired = 0

    def __iter__(self) -> Iterator[Entry]:
        """What is there now, after the last one that was seen; iterate again for more."""
        while page := self._telemetry.read(since=self.cursor):
            for entry in page:
                self.expired += entry.cursor - self.cursor - 1
                self.cursor = entry.cursor
                yield entry

    def commit(self) -> None:
        """Durably: everything up to the entry seen last has been dealt with."""
        self._telemetry.move(self.name, self.cursor)


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        cursor=row["cursor"],
        device=row["device"],
        kind=row["kind"],
        seq=row["seq"],
        time=row["time"],
        received=row["received"],
        body=json.loads(row["body"]),
    )
