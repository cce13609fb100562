"""The runs of a server, in its registry: what was asked for, and how far each has come. A restart takes them up from here."""

from __future__ import annotations

import json
import sqlite3
import threading
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fl_core.contracts.checkpoint import now
from fl_core.contracts.errors import InputError, unknown_name
from fl_core.contracts.names import checked_name

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, attended INTEGER NOT NULL, status TEXT NOT NULL, rounds_done INTEGER NOT NULL,
    error TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL
) STRICT;
"""
Status = Literal["running", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What was asked for. start: a checkpoint, "" = a fresh model. out: the run folder. Both absolute, or of the home.

    wait_s: how long the first round waits for ``min_devices``; None = as long as it takes.
    """

    name: str
    application: str
    rounds: int
    out: str
    start: str = ""
    preset: str = "default"
    overrides: tuple[str, ...] = ()
    seed: int = 0
    min_devices: int | None = None
    wait_s: float | None = None


@dataclass(frozen=True)
class RunRow:
    """attended: of a ``server run`` command, which takes it up itself; a standing server does not."""

    spec: RunSpec
    attended: bool
    status: Status
    rounds_done: int
    error: str
    created_at: str
    updated_at: str

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "application": self.spec.application,
            "status": self.status,
            "rounds_done": self.rounds_done,
            "rounds": self.spec.rounds,
            "out": self.spec.out,
            "seed": self.spec.seed,
            "overrides": list(self.spec.overrides),
            "attended": self.attended,
            "error": self.error or None,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        }


class RunTable:
    """Shares the registry's connection and lock."""

    def __init__(self, database: sqlite3.Connection, lock: threading.RLock) -> None:
        self._database, self._lock = database, lock
        database.executescript(_SCHEMA)

    def add(self, spec: RunSpec, *, attended: bool) -> RunRow:
        """As running. Raises InputError when another run has the name; a ``server run`` repeats its own."""
        checked_name(spec.name, "run name")
        row = (spec.name, json.dumps(asdict(spec)), int(attended), "running", 0, "", now(), now())
        with self._lock:
            known = self.find(spec.name)
            if known is not None and not (attended and known.attended and known.spec.out == spec.out):
                raise InputError(
                    f"there is a run {spec.name!r} already ({known.status})",
                    remedy="choose another --name, or 'fieldfleet runs resume'",
                )
            self._database.execute("INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?,?)", row)
        return self.get(spec.name)

    def note(self, name: str, status: Status, *, error: str = "") -> None:
        with self._lock:
            self._database.execute(
                "UPDATE runs SET status=?, error=?, updated_at=? WHERE name=?", (status, error[:2000], now(), name)
            )

    def note_round(self, name: str, number: int) -> None:
        with self._lock:
            self._database.execute("UPDATE runs SET rounds_done=?, updated_at=? WHERE name=?", (number, now(), name))

    def all(self) -> list[RunRow]:
        with self._lock:
            rows = self._database.execute("SELECT * FROM runs ORDER BY created_at, name").fetchall()
        return [_row(row) for row in rows]

    def find(self, name: str) -> RunRow | None:
        with self._lock:
            row = self._database.execute("SELECT * FROM runs WHERE name=?", (name,)).fetchone()
        return _row(row) if row else None

    def get(self, name: str) -> RunRow:
        """Raises InputError with the known names."""
        found = self.find(name)
        if found is None:
            raise unknown_name("run", name, [row.spec.name for row in self.all()])
        return found


def _row(row: sqlite3.Row) -> RunRow:
    table = json.loads(row["spec"])
    spec = RunSpec(**{**table, "overrides": tuple(table["overrides"])})
    return RunRow(
        spec=spec,
        attended=bool(row["attended"]),
        status=row["status"],
        rounds_done=row["rounds_done"],
        error=row["error"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
