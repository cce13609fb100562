"""The fleet: devices with their keys, groups and tags, enrolment tokens, and what happened to each. SQLite.

A running server reads it at each contact; commands write it from their own processes at the same time.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts.checkpoint import now
from fl_core.contracts.errors import InputError, RefusedError, unknown_name
from fl_core.contracts.names import checked_name
from fl_core.identity.keys import fingerprint
from fl_core.storage.database import connect
from fl_server.run_table import RunTable
from fl_server.tokens import TokenTable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    name TEXT PRIMARY KEY,
    public_key_pem BLOB NOT NULL UNIQUE,
    mqtt_password TEXT NOT NULL,
    registered_at TEXT NOT NULL,
    revoked_at TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS former_keys (
    public_key_pem BLOB PRIMARY KEY, name TEXT NOT NULL, replaced_at TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS happenings (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, device TEXT NOT NULL, what TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS happenings_of ON happenings (device, seq);
"""
_ADDED = {  # by later versions: a registry of an older one gets them when it is opened
    "approved_at": "TEXT NOT NULL DEFAULT '-'",
    "group_name": "TEXT NOT NULL DEFAULT ''",
    "tags": "TEXT NOT NULL DEFAULT '[]'",
    "seen_at": "REAL NOT NULL DEFAULT 0",
}
KEEP_HAPPENINGS = 200_000
MAX_TAGS = 32
WAITING = ""  # approved_at of a device that an operator has not approved yet


@dataclass(frozen=True)
class Device:
    """``approved_at``: "" while it waits for approval. ``seen_at``: its last contact, seconds since 1970; 0 = never."""

    name: str
    public_key_pem: bytes
    mqtt_password: str
    registered_at: str
    revoked_at: str
    approved_at: str
    group: str
    tags: tuple[str, ...]
    seen_at: float

    @property
    def revoked(self) -> bool:
        return bool(self.revoked_at)

    @property
    def pending(self) -> bool:
        return not self.approved_at

    @property
    def active(self) -> bool:
        """Whether it may take part."""
        return not self.revoked and not self.pending

    @property
    def status(self) -> str:
        return "revoked" if self.revoked else "pending" if self.pending else "active"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public_key_pem)

    def check_active(self) -> None:
        """Raises RefusedError saying why it may not take part."""
        if self.revoked:
            raise RefusedError(f"device {self.name!r} was revoked on {self.revoked_at}")
        if self.pending:
            raise RefusedError(
                f"device {self.name!r} waits for approval",
                remedy=f"on the server: fieldfleet fleet approve {self.name}",
            )


class Registry:
    """May be shared by threads; other processes may use the same file at the same time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        fresh = not path.exists()
        self._database = connect(path, _SCHEMA)
        if fresh:
            path.chmod(0o600)
        self._migrate()
        self.tokens = TokenTable(self._database, self._lock)
        self.runs = RunTable(self._database, self._lock)

    def _migrate(self) -> None:
        with self._change():
            known = {row["name"] for row in self._database.execute("PRAGMA table_info(devices)")}
            for column, kind in _ADDED.items():
                if column not in known:
                    self._database.execute(f"ALTER TABLE devices ADD COLUMN {column} {kind}")

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    # who belongs to the fleet

    def register(
        self, name: str, public_key_pem: bytes, *, group: str = "", tags: Iterable[str] = (), by: str = "operator"
    ) -> Device:
        """Add a device and approve it; the same name with the same key again lifts a revocation.

        Raises InputError when the name belongs to another key, or the key to another name or to an earlier life.
        """
        return self.register_all([(name, public_key_pem, group, tags)], by=by)[0]

    def register_all(
        self, found: Iterable[tuple[str, bytes, str, Iterable[str]]], *, by: str = "operator"
    ) -> list[Device]:
        """(name, key, group, tags) of each: all of them or, with one error, none."""
        names = []
        with self._change():
            for name, pem, group, tags in found:
                self._add(name, pem, now(), group, tags, by)
                self._database.execute(
                    "UPDATE devices SET revoked_at='', approved_at=CASE approved_at WHEN '' THEN ? ELSE approved_at END "
                    "WHERE name=?",
                    (now(), name),
                )
                names.append(name)
            return [self._named(name) for name in names]

    def enrol(self, secret: str, name: str, public_key_pem: bytes) -> Device:
        """Add a device that shows a token: approved at once or pending, as the token says.

        The same name, key and token again changes nothing and uses nothing up. Raises RefusedError for a token that is
        not valid (any more), InputError as ``register``.
        """
        with self._change():
            token = self.tokens.check(secret)
            same = self._one("public_key_pem", public_key_pem)
            if same is not None and same.name == name:
                return same  # the answer was lost, and it asks again
            token = self.tokens.use(secret)
            approved = now() if token.auto_approve else WAITING
            self._add(name, public_key_pem, approved, token.group, (), f"token {token.id}")
            return self._named(name)

    def _add(self, name: str, pem: bytes, approved: str, group: str, tags: Iterable[str], by: str) -> None:
        checked_name(name, "device name")
        same_name, same_key = self._one("name", name), self._one("public_key_pem", pem)
        if same_name and same_name.public_key_pem != pem:
            raise InputError(
                f"device {name!r} is registered with another key ({same_name.fingerprint})",
                remedy="choose another --name; a device that lost its key is a new device",
            )
        if same_key and same_key.name != name:
            raise InputError(f"this key is registered as device {same_key.name!r}", remedy="one key, one device")
        if self.former_owner(pem) is not None:
            raise InputError("this key was replaced by a newer one", remedy="use the device's present key")
        if same_name is None:
            self._database.execute(
                "INSERT INTO devices (name, public_key_pem, mqtt_password, registered_at, approved_at, group_name, tags) "
                "VALUES (?,?,?,?,?,?,?)",
                (name, pem, secrets.token_urlsafe(24), now(), approved, _group(group), _tags(tags)),
            )
        self._note(name, "registered" if approved else "enrolled", by)

    def approve(self, names: Iterable[str]) -> list[Device]:
        return self._set(names, "approved", "approved_at=CASE approved_at WHEN '' THEN :now ELSE approved_at END")

    def revoke(self, name: str) -> Device:
        """Refuse this device from now on. Raises InputError with the known names."""
        return self.revoke_all([name])[0]

    def revoke_all(self, names: Iterable[str]) -> list[Device]:
        return self._set(names, "revoked", "revoked_at=CASE revoked_at WHEN '' THEN :now ELSE revoked_at END")

    def restore(self, names: Iterable[str]) -> list[Device]:
        """Lift a revocation."""
        return self._set(names, "restored", "revoked_at=''")

    def set_group(self, names: Iterable[str], group: str) -> list[Device]:
        """ "" takes them out of their group."""
        return self._set(names, "grouped", "group_name=:value", _group(group))

    def change_tags(self, names: Iterable[str], add: Iterable[str], remove: Iterable[str]) -> list[Device]:
        add, remove, changed = list(add), set(remove), []
        with self._change():
            for name in names:
                device = self._named(name)
                tags = _tags([*(t for t in device.tags if t not in remove), *add])
                self._database.execute("UPDATE devices SET tags=? WHERE name=?", (tags, name))
                self._note(name, "tagged", tags)
                changed.append(self._named(name))
        return changed

    def rotate(self, name: str, old_pem: bytes, new_pem: bytes) -> Device:
        """Replace a device's key; the old one is refused for ever. Raises InputError, RefusedError."""
        with self._change():
            device = self._named(name)
            device.check_active()
            if device.public_key_pem == new_pem and self.former_owner(old_pem) == name:
                return device
            if device.public_key_pem != old_pem:
                raise RefusedError("the key was replaced meanwhile")
            if self._one("public_key_pem", new_pem) is not None or self.former_owner(new_pem) is not None:
                raise InputError("the new key is in use already", remedy="make a fresh one")
            self._database.execute("INSERT INTO former_keys VALUES (?,?,?)", (old_pem, name, now()))
            self._database.execute("UPDATE devices SET public_key_pem=? WHERE name=?", (new_pem, name))
            self._note(name, "key rotated", fingerprint(new_pem))
            return self._named(name)

    def _set(self, names: Iterable[str], what: str, assignment: str, value: str = "") -> list[Device]:
        """All of them or, when one is unknown, none."""
        changed = []
        with self._change():
            for name in names:
                self._named(name)
                self._database.execute(
                    f"UPDATE devices SET {assignment} WHERE name=:name",  # noqa: S608 own text
                    {"now": now(), "value": value, "name": name},
                )
                self._note(name, what, value)
                changed.append(self._named(name))
        return changed

    def note_seen(self, times: Mapping[str, float]) -> None:
        """name -> time of its last contact, for many devices at once."""
        with self._change():
            self._database.executemany(
                "UPDATE devices SET seen_at=? WHERE name=? AND seen_at<?", [(t, name, t) for name, t in times.items()]
            )

    # questions

    def devices(self) -> list[Device]:
        """All, by name, the revoked and the pending ones too."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM devices ORDER BY name").fetchall()
        return [_device(row) for row in rows]

    def by_key(self, public_key_pem: bytes) -> Device | None:
        with self._lock:
            return self._one("public_key_pem", public_key_pem)

    def by_name(self, name: str) -> Device | None:
        with self._lock:
            return self._one("name", name)

    def former_owner(self, public_key_pem: bytes) -> str | None:
        """The device whose key this was before it was rotated."""
        with self._lock:
            row = self._database.execute(
                "SELECT name FROM former_keys WHERE public_key_pem=?", (public_key_pem,)
            ).fetchone()
        return str(row["name"]) if row else None

    def mqtt_password(self, name: str) -> str | None:
        """The password of an MQTT account; None for a device that may not take part."""
        with self._lock:
            device = self._one("name", name)
        return device.mqtt_password if device is not None and device.active else None

    def happenings(self, name: str = "", *, limit: int = 100) -> list[dict[str, Any]]:
        """What happened to one device, or to all: the newest first."""
        with self._lock:
            rows = self._database.execute(
                "SELECT time, device, what, detail FROM happenings WHERE ?='' OR device=? ORDER BY seq DESC LIMIT ?",
                (name, name, limit),
            ).fetchall()
        return [dict(row) for row in rows]

    def version(self) -> int:
        """Another number after each change that another process made."""
        with self._lock:
            return int(self._database.execute("PRAGMA data_version").fetchone()[0])

    def stamp(self) -> tuple[int, int]:
        """Another value after each change, whoever made it."""
        with self._lock:
            return int(self._database.execute("PRAGMA data_version").fetchone()[0]), self._database.total_changes

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _named(self, name: str) -> Device:
        device = self._one("name", name)
        if device is None:
            raise unknown_name("device", name, [d.name for d in self.devices()])
        return device

    def _one(self, column: str, value: str | bytes) -> Device | None:
        row = self._database.execute(f"SELECT * FROM devices WHERE {column}=?", (value,)).fetchone()  # noqa: S608 own names
        return _device(row) if row else None

    def _note(self, device: str, what: str, detail: str) -> None:
        cursor = self._database.execute(
            "INSERT INTO happenings (time, device, what, detail) VALUES (?,?,?,?)", (now(), device, what, detail)
        )
        self._database.execute("DELETE FROM happenings WHERE seq<=?", ((cursor.lastrowid or 0) - KEEP_HAPPENINGS,))


def _device(row: sqlite3.Row) -> Device:
    table = dict(row)
    return Device(group=table.pop("group_name"), tags=tuple(json.loads(table.pop("tags"))), **table)


def _group(name: str) -> str:
    return checked_name(name, "group") if name else ""


def _tags(tags: Iterable[str]) -> str:
    found = sorted({checked_name(tag, "tag") for tag in tags})
    if len(found) > MAX_TAGS:
        raise InputError(f"{len(found)} tags are too many", remedy=f"at most {MAX_TAGS} on one device")
    return json.dumps(found)
