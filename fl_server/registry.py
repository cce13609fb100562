"""Which devices belong to the fleet: name, public key, MQTT password. SQLite, read by a running server at each contact."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from fl_core.contracts.checkpoint import now
from fl_core.contracts.errors import InputError, unknown_name
from fl_core.contracts.names import checked_name
from fl_core.identity.keys import fingerprint
from fl_core.storage.database import connect

_SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    name TEXT PRIMARY KEY,
    public_key_pem BLOB NOT NULL UNIQUE,
    mqtt_password TEXT NOT NULL,
    registered_at TEXT NOT NULL,
    revoked_at TEXT NOT NULL DEFAULT ''
) STRICT;
"""


@dataclass(frozen=True)
class Device:
    name: str
    public_key_pem: bytes
    mqtt_password: str
    registered_at: str
    revoked_at: str

    @property
    def revoked(self) -> bool:
        return bool(self.revoked_at)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public_key_pem)


class Registry:
    """May be shared by threads; other processes may use the same file at the same time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        fresh = not path.exists()
        self._database = connect(path, _SCHEMA)
        if fresh:
            path.chmod(0o600)

    def register(self, name: str, public_key_pem: bytes) -> Device:
        """Add a device; the same name with the same key again changes nothing (and lifts a revocation).

        Raises InputError when the name belongs to another key, or the key to another name.
        """
        checked_name(name, "device name")
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            same_name, same_key = self._one("name", name), self._one("public_key_pem", public_key_pem)
            if same_name and same_name.public_key_pem != public_key_pem:
                raise InputError(
                    f"device {name!r} is registered with another key ({same_name.fingerprint})",
                    remedy="choose another --name; a device that lost its key is a new device",
                )
            if same_key and same_key.name != name:
                raise InputError(f"this key is registered as device {same_key.name!r}", remedy="one key, one device")
            if same_name:
                self._database.execute("UPDATE devices SET revoked_at='' WHERE name=?", (name,))
            else:
                row = (name, public_key_pem, secrets.token_urlsafe(24), now())
                self._database.execute(
                    "INSERT INTO devices (name, public_key_pem, mqtt_password, registered_at) VALUES (?,?,?,?)", row
                )
            device = self._one("name", name)
            assert device is not None
            return device

    def revoke(self, name: str) -> Device:
        """Refuse this device from now on. Raises InputError with the known names."""
        with self._lock:
            self._database.execute("UPDATE devices SET revoked_at=? WHERE name=? AND revoked_at=''", (now(), name))
            device = self._one("name", name)
        if device is None:
            raise unknown_name("device", name, [d.name for d in self.devices()])
        return device

    def devices(self) -> list[Device]:
        """All, by name, the revoked ones too."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM devices ORDER BY name").fetchall()
        return [_device(row) for row in rows]

    def by_key(self, public_key_pem: bytes) -> Device | None:
        with self._lock:
            return self._one("public_key_pem", public_key_pem)

    def by_name(self, name: str) -> Device | None:
        with self._lock:
            return self._one("name", name)

    def mqtt_password(self, name: str) -> str | None:
        """The password of an MQTT account; None for a device that is unknown or revoked."""
        with self._lock:
            device = self._one("name", name)
        return None if device is None or device.revoked else device.mqtt_password

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _one(self, column: str, value: str | bytes) -> Device | None:
        row = self._database.execute(f"SELECT * FROM devices WHERE {column}=?", (value,)).fetchone()  # noqa: S608 own names
        return _device(row) if row else None


def _device(row: sqlite3.Row) -> Device:
    return Device(**dict(row))
