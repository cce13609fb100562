"""The server's table of devices and jobs, in SQLite: what each device last said of itself, and what was asked of it."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.link.batch import Batch
from fl_core.link.envelope import Envelope
from fl_core.link.signed import place_of
from fl_core.storage import database
from fl_server.telemetry import Taken, Telemetry

DATABASE_NAME = "devices.db"
SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    name TEXT PRIMARY KEY, alive INTEGER NOT NULL, boot INTEGER NOT NULL, connection INTEGER NOT NULL,
    since REAL NOT NULL, last_seen REAL NOT NULL, state TEXT NOT NULL, telemetry TEXT);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, device TEXT NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL, created REAL NOT NULL,
    expires REAL NOT NULL, reply TEXT, replied REAL);
CREATE TABLE IF NOT EXISTS places (
    device TEXT PRIMARY KEY, boot INTEGER NOT NULL, connection INTEGER NOT NULL, number INTEGER NOT NULL, time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS open_jobs ON jobs (device, expires) WHERE replied IS NULL;
"""
# A death says nothing but that it is one: the table keeps what the device was.
UPSERT = """
INSERT INTO devices (name, alive, boot, connection, since, last_seen, state) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (name) DO UPDATE SET alive = excluded.alive, boot = excluded.boot, connection = excluded.connection,
    last_seen = excluded.last_seen, since = CASE WHEN alive = excluded.alive THEN since ELSE excluded.since END,
    state = CASE WHEN excluded.alive THEN excluded.state ELSE state END
"""
# Whether it is alive, and its last birth, only MQTT knows.
POSTED = """
INSERT INTO devices (name, alive, boot, connection, since, last_seen, state) VALUES (?, ?, 0, 0, ?, ?, ?)
ON CONFLICT (name) DO UPDATE SET last_seen = excluded.last_seen, state = excluded.state
"""
DEAD, ALIVE, UNKNOWN = 0, 1, 2
DEAD_TYPES = ("death", "stopped")


@dataclass(frozen=True)
class Job:
    """``reply`` is None until the device has answered: {"ok": bool, ...}."""

    id: str
    device: str
    type: str
    body: dict[str, Any]
    reply: dict[str, Any] | None


class DeviceTable:
    """Thread-safe; another process may read it at the same time."""

    def __init__(self, path: Path, telemetry: Telemetry | None = None) -> None:
        self._lock = threading.Lock()
        self._db = database.connect(path, SCHEMA)
        self.telemetry = telemetry or Telemetry(path)

    def close(self) -> None:
        self.telemetry.close()
        with self._lock:
            self._db.close()

    def forget_alive(self) -> None:
        """Before the bridge connects: a device counts as alive again once the broker says so."""
        with self._lock:
            self._db.execute("UPDATE devices SET alive = ? WHERE alive = ?", (UNKNOWN, ALIVE))

    def shut_out(self, device: str) -> None:
        """It was revoked: nothing that it signs counts any more, the will that would tell its end neither."""
        with self._lock:
            self._db.execute(
                "UPDATE devices SET alive = ?, since = ? WHERE name = ? AND alive = ?",
                (DEAD, time.time(), device, ALIVE),
            )

    def next_in_place(self, device: str, message: Envelope) -> bool:
        """Whether a (signed) state comes after all that this device has said; the last one again, kept by a broker, does.

        A device that was set up anew counts from 1 again: its birth is told from an old one, repeated, by its time.
        """
        place = place_of(message)
        with self._lock:
            row = self._db.execute("SELECT * FROM places WHERE device = ?", (device,)).fetchone()
            earlier = row is not None and place < (row["boot"], row["connection"], row["number"])
            if earlier and (message.type != "birth" or message.time <= row["time"]):
                return False
            self._db.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?)", (device, *place, message.time))
        return True

    def note_state(self, device: str, message: Envelope) -> bool:
        """Birth, change or death. False for a death or change that is older than what is known of the device.

        A birth always counts: only a live connection sends one, and a device that was set up anew counts from 1.
        """
        now, alive = time.time(), DEAD if message.type in DEAD_TYPES else ALIVE
        with self._lock:
            row = self._db.execute("SELECT boot, connection, alive FROM devices WHERE name = ?", (device,)).fetchone()
            if row is not None:
                known = (row["boot"], row["connection"])
                if message.order < known and message.type != "birth":
                    return False
                if message.order == known and row["alive"] == DEAD and alive == ALIVE:
                    return False  # its will came first: that connection has ended
            self._db.execute(UPSERT, (device, alive, *message.order, now, now, json.dumps(message.body)))
        return True

    def take_records(self, device: str, batch: Batch) -> Taken:
        """Telemetry, each record once; the last one beside the device."""
        taken = self.telemetry.take(device, batch)
        if taken.fresh:
            last = taken.fresh[-1]
            self._note_last(device, {**last.body, "type": last.kind, "time": last.time})
        return taken

    def note_posted(self, device: str, state: dict[str, Any]) -> None:
        """What a device without MQTT says of itself; whether it is alive, its connection to the federation tells."""
        now = time.time()
        with self._lock:
            self._db.execute(POSTED, (device, UNKNOWN, now, now, json.dumps(state)))

    def note_report(self, device: str, message: Envelope) -> bool:
        """A single report. False for one that was seen before."""
        if not self.telemetry.take_report(device, message):
            return False
        self._note_last(device, {**message.body, "type": message.type, "time": message.time})
        return True

    def devices(self) -> list[dict[str, Any]]:
        """By name: name, alive, boot, connection, since, last_seen (seconds since 1970), state, telemetry."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM devices ORDER BY name").fetchall()
        return [_device(row) for row in rows]

    def said(self) -> list[tuple[str, float, str]]:
        """(name, last_seen, state as JSON) of every device, unread: most have said nothing new since the last look."""
        with self._lock:
            rows = self._db.execute("SELECT name, last_seen, state FROM devices").fetchall()
        return [(row["name"], row["last_seen"], row["state"]) for row in rows]

    def reports(self, device: str, kind: str = "", *, limit: int = 100) -> list[dict[str, Any]]:
        """The newest first."""
        return self.telemetry.latest(device, kind, limit=limit)

    def add_job(self, job: Job, *, valid_s: float) -> None:
        now = time.time()
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO jobs (id, device, type, body, created, expires) VALUES (?, ?, ?, ?, ?, ?)",
                (job.id, job.device, job.type, json.dumps(job.body), now, now + valid_s),
            )
            self._db.execute("DELETE FROM jobs WHERE expires < ? AND created < ?", (now, now - 30 * 86_400))

    def note_reply(self, device: str, message: Envelope) -> bool:
        """False unless it answers an open job of this very device."""
        with self._lock:
            cursor = self._db.execute(
                "UPDATE jobs SET reply = ?, replied = ? WHERE id = ? AND device = ? AND replied IS NULL",
                (json.dumps(message.body), time.time(), message.id, device),
            )
        return cursor.rowcount == 1

    def open_jobs(self, device: str) -> list[Job]:
        """Not answered and not expired, the oldest first: sent again at each birth."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE device = ? AND replied IS NULL AND expires > ? ORDER BY created",
                (device, time.time()),
            ).fetchall()
        return [_job(row) for row in rows]

    def job(self, job_id: str) -> Job | None:
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    def _note_last(self, device: str, report: dict[str, Any]) -> None:
        with self._lock:
            self._db.execute(
                "UPDATE devices SET telemetry = ?, last_seen = ? WHERE name = ?",
                (json.dumps(report), time.time(), device),
            )


def _device(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "name": row["name"],
        "alive": row["alive"] == ALIVE,
        "boot": row["boot"],
        "connection": row["connection"],
        "since": row["since"],
        "last_seen": row["last_seen"],
        "state": json.loads(row["state"]),
        "telemetry": json.loads(row["telemetry"]) if row["telemetry"] else None,
    }


def _job(row: sqlite3.Row) -> Job:
    reply = json.loads(row["reply"]) if row["reply"] else None
    return Job(row["id"], row["device"], row["type"], json.loads(row["body"]), reply)
