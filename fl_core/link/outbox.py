"""The device's disk outbox and job store: one SQLite file, so that a job's end and its reply are one transaction.

Messages in the outbox survive kill -9 and are published, in order, once a broker acknowledges them (QoS 1: at least
once). When it is full, the oldest telemetry goes first; what was dropped is counted and reported.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fl_core.contracts.errors import EnvironmentFault
from fl_core.storage import database

SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL, payload BLOB NOT NULL, droppable INTEGER NOT NULL,
    made REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, type TEXT NOT NULL, seen REAL NOT NULL, topic TEXT, reply BLOB);
"""


@dataclass(frozen=True)
class Stored:
    """One message that waits for the broker's acknowledgement."""

    seq: int
    topic: str
    payload: bytes


@contextmanager
def unusable_outbox(path: Path) -> Iterator[None]:
    """What SQLite cannot read, said to people, with the remedy."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise EnvironmentFault(
            f"{path}: not usable as the device's outbox: {error}", remedy="move the file away and start again"
        ) from None


class DeviceStore:
    """Outbox and jobs. Thread-safe; ``max_messages`` and ``max_bytes`` (of payload) bound the outbox, ``max_jobs`` the memory of jobs."""

    def __init__(
        self,
        path: Path,
        *,
        max_messages: int = 5_000,
        max_bytes: int = 16 * 2**20,
        max_age_s: float = 30 * 86_400.0,
        max_jobs: int = 1_000,
    ) -> None:
        self._lock = threading.RLock()
        self._max_messages, self._max_bytes, self._max_jobs = max_messages, max_bytes, max_jobs
        self._max_age = max_age_s
        self._listener: Callable[[], None] | None = None
        with unusable_outbox(path):
            self._db = database.connect(path, SCHEMA)
            if "made" not in {row["name"] for row in self._db.execute("PRAGMA table_info(outbox)")}:
                self._db.execute(
                    "ALTER TABLE outbox ADD COLUMN made REAL NOT NULL DEFAULT 0"
                )  # a file of an older version
            self._db.execute("UPDATE outbox SET made = ? WHERE made = 0", (time.time(),))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """``listener`` is called, from any thread, after each new message."""
        self._listener = listener

    # the outbox

    def put(self, topic: str, payload: bytes, *, droppable: bool = False) -> int:
        """Keep until ``done``. Returns the sequence number."""
        with self._transaction():
            seq = self._insert(topic, payload, droppable)
        self._notify()
        return seq

    def waiting(self, *, after: int = 0, limit: int = 100) -> list[Stored]:
        """The oldest messages with a sequence number above ``after``."""
        with self._lock:
            rows = self._db.execute(
                "SELECT seq, topic, payload FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
            ).fetchall()
        return [Stored(row["seq"], row["topic"], row["payload"]) for row in rows]

    def done(self, seqs: Iterable[int]) -> None:
        """The broker has acknowledged these."""
        numbers = [(seq,) for seq in seqs]
        if numbers:
            with self._transaction():
                self._db.executemany("DELETE FROM outbox WHERE seq = ?", numbers)

    def depth(self) -> tuple[int, int]:
        """(messages that wait, messages dropped since the store was made)."""
        with self._lock:
            count = self._db.execute("SELECT COUNT(*) FROM outbox").fetchone()[0]
            row = self._db.execute("SELECT value FROM counters WHERE name = 'dropped'").fetchone()
        return count, row["value"] if row else 0

    # the jobs

    def reply_of(self, job_id: str) -> Stored | None:
        """The reply of a job that was finished before: repeat it, do not run the job again."""
        with self._lock:
            row = self._db.execute("SELECT topic, reply FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return Stored(0, row["topic"], row["reply"]) if row else None

    def finish(self, job_id: str, kind: str, topic: str, reply: bytes) -> None:
        """Record a job as done and queue its reply, in one transaction."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO jobs (id, type, seen, topic, reply) VALUES (?, ?, ?, ?, ?)",
                (job_id, kind, time.time(), topic, reply),
            )
            self._db.execute(
                "DELETE FROM jobs WHERE rowid <= (SELECT MAX(rowid) FROM jobs) - ?",
                (self._max_jobs,),
            )
            self._insert(topic, reply, False)
        self._notify()

    # inside

    def _insert(self, topic: str, payload: bytes, droppable: bool) -> int:
        cursor = self._db.execute(
            "INSERT INTO outbox (topic, payload, droppable, made) VALUES (?, ?, ?, ?)",
            (topic, payload, int(droppable), time.time()),
        )
        self._drop("made < ?", time.time() - self._max_age)
        while self._over_bounds():
            self._drop("seq = (SELECT seq FROM outbox ORDER BY droppable DESC, seq LIMIT 1)")
        return int(cursor.lastrowid or 0)

    def _drop(self, where: str, *values: float) -> None:
        count = self._db.execute(f"DELETE FROM outbox WHERE {where}", values).rowcount  # noqa: S608 own text
        if count:
            self._db.execute(
                "INSERT INTO counters (name, value) VALUES ('dropped', ?) "
                "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                (count,),
            )

    def _over_bounds(self) -> bool:
        count, size = self._db.execute("SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0) FROM outbox").fetchone()
        return bool(count > self._max_messages or (size > self._max_bytes and count > 1))

    def _notify(self) -> None:
        if self._listener is not None:
            self._listener()

    def _transaction(self) -> AbstractContextManager[None]:
        return database.transaction(self._db, self._lock)
