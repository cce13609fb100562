"""The index of a device's samples: SQLite, standard library only, so that the agent itself can ask it.

What a folder of samples holds:
samples.db   the index      content/   one file a sample      quarantine/   damaged ones      snapshots/   frozen data sets
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import DataError, EnvironmentFault
from fl_core.link.envelope import ID_PATTERN
from fl_core.storage import atomic, database

INDEX_NAME = "samples.db"
LIMITS_NAME = "limits.json"
MAX_QUARANTINED = 1_000
MAX_WAITING_LABELS = 100_000
FUTURE_S = 86_400.0  # a sample from further ahead has a wrong clock
SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    id TEXT PRIMARY KEY, file TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, time REAL NOT NULL,
    added REAL NOT NULL, label TEXT, labelled REAL, facts TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS samples_by_time ON samples (time, id);
CREATE TABLE IF NOT EXISTS waiting_labels (id TEXT PRIMARY KEY, label TEXT NOT NULL, added REAL NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, file TEXT NOT NULL, reason TEXT NOT NULL, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one store; over them the oldest samples go."""

    max_bytes: int = 2**30
    max_samples: int = 100_000
    max_age_s: float = 90 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sample; ``file`` lies in content/."""

    id: str
    file: str
    sha256: str
    bytes: int
    time: float
    label: Any
    facts: dict[str, Any]


class SampleIndex:
    """Thread-safe; several processes may use it at the same time. Every method is one transaction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            self._db = database.connect(folder / INDEX_NAME, SCHEMA)
        except sqlite3.DatabaseError as error:
            raise EnvironmentFault(
                f"{folder / INDEX_NAME}: not usable as the index of this device's samples: {error}",
                remedy="move the folder away; the agent makes a new one",
            ) from None

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # what comes in

    def add(self, entry: Entry) -> bool:
        """False for the same sample again. Raises DataError for another one with its id, or of another schema."""
        checked_id(entry.id)
        with self._transaction():
            known = self._row("SELECT sha256 FROM samples WHERE id = ?", entry.id)
            if known is not None:
                if known["sha256"] == entry.sha256:
                    self._count("repeated")
                    return False
                raise DataError(f"sample {entry.id!r} is there already, with another content")
            self._check_schema(str(entry.facts.get("schema", "")))
            now = time.time()
            waiting = self._row("SELECT label FROM waiting_labels WHERE id = ?", entry.id)
            label = json.loads(waiting["label"]) if waiting is not None else entry.label
            self._db.execute("DELETE FROM waiting_labels WHERE id = ?", (entry.id,))
            made = entry.time if entry.time < now + FUTURE_S else now
            self._db.execute(
                "INSERT INTO samples (id, file, sha256, bytes, time, added, label, labelled, facts) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    entry.id,
                    entry.file,
                    entry.sha256,
                    entry.bytes,
                    made,
                    now,
                    None if label is None else json.dumps(label, sort_keys=True),
                    None if label is None else now,
                    json.dumps(entry.facts, sort_keys=True),
                ),
            )
            self._count("added")
        return True

    def label(self, sample_id: str, value: Any) -> str:
        """ "labelled", "unchanged", or "waiting" for a sample that has not come yet. A later label replaces an earlier one."""
        checked_id(sample_id)
        text, now = json.dumps(value, sort_keys=True, allow_nan=False), time.time()
        with self._transaction():
            row = self._row("SELECT label FROM samples WHERE id = ?", sample_id)
            if row is None:
                self._db.execute("INSERT OR REPLACE INTO waiting_labels VALUES (?, ?, ?)", (sample_id, text, now))
                self._db.execute(
                    "DELETE FROM waiting_labels WHERE rowid <= (SELECT MAX(rowid) FROM waiting_labels) - ?",
                    (MAX_WAITING_LABELS,),
                )
                return "waiting"
            if row["label"] == text:
                return "unchanged"
            self._db.execute("UPDATE samples SET label = ?, labelled = ? WHERE id = ?", (text, now, sample_id))
            self._count("labels")
        return "labelled"

    def quarantine(self, name: str, file: str, reason: str) -> list[str]:
        """Note a damaged one. Returns files in quarantine/ that are to go: the oldest, over the limit."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO quarantine (name, file, reason, time) VALUES (?, ?, ?, ?)",
                (name[:200], file, reason[:500], time.time()),
            )
            self._count("quarantined")
            old = self._db.execute(
                "SELECT number, file FROM quarantine WHERE number <= (SELECT MAX(number) FROM quarantine) - ?",
                (MAX_QUARANTINED,),
            ).fetchall()
            self._db.executemany("DELETE FROM quarantine WHERE number = ?", [(row["number"],) for row in old])
        return [row["file"] for row in old]

    def expire(self, limits: Limits, now: float | None = None) -> list[str]:
        """Forget what is too old or too much, the oldest first. Returns the files in content/ that are to go."""
        now = time.time() if now is None else now
        with self._transaction():
            gone = [
                (row["id"], row["file"])
                for row in self._db.execute("SELECT id, file FROM samples WHERE time < ?", (now - limits.max_age_s,))
            ]
            self._count("expired", len(gone))
            self._forget(gone)
            self._db.execute("DELETE FROM waiting_labels WHERE added < ?", (now - limits.max_age_s,))
            over = self._over(limits)
            self._count("over_quota", len(over))
            self._forget(over)
        return [file for _, file in (*gone, *over)]

    # what is there

    def entries(self, *, labelled: bool, since: float = -1e300) -> list[Entry]:
        """In the order of their ids, as of one moment. since: by the samples' own time."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM samples WHERE time >= ? AND (NOT ? OR label IS NOT NULL) ORDER BY id",
                (since, labelled),
            ).fetchall()
        return [_entry(row) for row in rows]

    def files(self) -> set[str]:
        with self._lock:
            return {row["file"] for row in self._db.execute("SELECT file FROM samples")}

    def quarantined(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest first: name, file, reason, time."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name, file, reason, time FROM quarantine ORDER BY number DESC LIMIT ?", (limit,)
            ).fetchall()
        return [dict(row) for row in rows]

    def summary(self) -> dict[str, Any]:
        """Counts and times (seconds since 1970, None while there is nothing): what a device may tell of its data."""
        with self._lock:
            row = self._db.execute(
                "SELECT COUNT(*) AS samples, COUNT(label) AS labelled, COALESCE(SUM(bytes), 0) AS bytes, "
                "MIN(time) AS oldest, MAX(time) AS newest, MAX(labelled) AS newest_label FROM samples"
            ).fetchone()
            waiting = self._db.execute("SELECT COUNT(*) FROM waiting_labels").fetchone()[0]
            counters = {r["name"]: r["value"] for r in self._db.execute("SELECT name, value FROM counters")}
        names = ("added", "repeated", "labels", "quarantined", "expired", "over_quota")
        return {**dict(row), "waiting_labels": waiting, **{name: counters.get(name, 0) for name in names}}

    # inside

    def _check_schema(self, schema: str) -> None:
        """All samples of one store have the schema of its first."""
        row = self._row("SELECT value FROM facts WHERE name = 'schema'")
        if row is None or self._row("SELECT 1 FROM samples LIMIT 1") is None:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES ('schema', ?)", (schema,))
        elif row["value"] != schema:
            raise DataError(f"its schema is {schema!r}, that of the samples before it {row['value']!r}")

    def _over(self, limits: Limits) -> list[tuple[str, str]]:
        row = self._db.execute("SELECT COUNT(*) AS number, COALESCE(SUM(bytes), 0) AS bytes FROM samples").fetchone()
        number, size, over = row["number"], row["bytes"], list[tuple[str, str]]()
        if number <= limits.max_samples and size <= limits.max_bytes:
            return over
        for row in self._db.execute("SELECT id, file, bytes FROM samples ORDER BY time, id"):
            if number <= limits.max_samples and size <= limits.max_bytes:
                break
            over.append((row["id"], row["file"]))
            number, size = number - 1, size - row["bytes"]
        return over

    def _forget(self, entries: Iterable[tuple[str, str]]) -> None:
        self._db.executemany("DELETE FROM samples WHERE id = ?", [(sample_id,) for sample_id, _ in entries])

    def _count(self, name: str, number: int = 1) -> None:
        if number:
            self._db.execute(
                "INSERT INTO counters (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?",
                (name, number, number),
            )

    def _row(self, query: str, *values: Any) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return found

    def _transaction(self) -> AbstractContextManager[None]:
        return database.transaction(self._db, self._lock)


def checked_id(sample_id: str) -> str:
    """Raises DataError: an id is also part of file names."""
    if not ID_PATTERN.fullmatch(sample_id):
        raise DataError(f"sample id {sample_id[:80]!r} must match {ID_PATTERN.pattern}")
    return sample_id


def prepare(folder: Path, limits: Limits | None = None) -> None:
    """The folders of a store; with ``limits`` also its empty index, and the limits beside it for those without settings."""
    for name in ("content", "quarantine", "snapshots"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if limits is not None:
        SampleIndex(folder).close()
        atomic.write_json(folder / LIMITS_NAME, asdict(limits))


def stored_limits(folder: Path) -> Limits:
    try:
        return Limits(**json.loads((folder / LIMITS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Limits()


def is_store(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file()


def content_name(sample_id: str, suffix: str) -> str:
    return hashlib.sha256(sample_id.encode()).hexdigest()[:40] + suffix


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        id=row["id"],
        file=row["file"],
        sha256=row["sha256"],
        bytes=row["bytes"],
        time=row["time"],
        label=None if row["label"] is None else json.loads(row["label"]),
        facts=json.loads(row["facts"]),
    )
