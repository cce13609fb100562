"""Enrolment tokens in the registry: only a hash of each secret is kept, with its uses, its end and what it gives."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import threading
import time
from dataclasses import dataclass

from fl_core.contracts.checkpoint import now
from fl_core.contracts.errors import InputError, RefusedError, unknown_name

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY, secret_sha256 TEXT NOT NULL, uses_left INTEGER NOT NULL, expires REAL NOT NULL,
    group_name TEXT NOT NULL, auto_approve INTEGER NOT NULL, created_at TEXT NOT NULL
) STRICT;
"""
MAX_USES, LONGEST_S = 100_000, 366 * 86_400.0
KEEP_S = 30 * 86_400.0
NOT_VALID = "the enrolment token is not valid: wrong, used up, expired or withdrawn"


@dataclass(frozen=True)
class Token:
    """expires: seconds since 1970."""

    id: str
    uses_left: int
    expires: float
    group: str
    auto_approve: bool
    created_at: str


class TokenTable:
    """Shares the registry's connection and lock; ``check`` and ``use`` are called inside its transaction."""

    def __init__(self, database: sqlite3.Connection, lock: threading.RLock) -> None:
        self._database, self._lock = database, lock
        database.executescript(_SCHEMA)

    def create(self, *, uses: int, valid_s: float, group: str, auto_approve: bool) -> tuple[Token, str]:
        """(the token, its secret): the secret is told only now."""
        if not 1 <= uses <= MAX_USES:
            raise InputError(f"--uses {uses} is not accepted", remedy=f"1 to {MAX_USES:,}")
        if not 1.0 <= valid_s <= LONGEST_S:
            raise InputError(f"a token valid for {valid_s:g} s is not accepted", remedy="1 s to 366 days")
        token_id, secret = secrets.token_hex(4), secrets.token_urlsafe(24)
        with self._lock:
            self._database.execute("DELETE FROM tokens WHERE expires<?", (time.time() - KEEP_S,))
            self._database.execute(
                "INSERT INTO tokens VALUES (?,?,?,?,?,?,?)",
                (token_id, _hash(secret), uses, time.time() + valid_s, group, int(auto_approve), now()),
            )
        return self._read(token_id), f"{token_id}.{secret}"

    def all(self) -> list[Token]:
        with self._lock:
            rows = self._database.execute("SELECT * FROM tokens ORDER BY created_at, id").fetchall()
        return [_token(row) for row in rows]

    def withdraw(self, token_id: str) -> Token:
        """Raises InputError with the known ids."""
        with self._lock:
            self._database.execute("UPDATE tokens SET uses_left=0 WHERE id=?", (token_id,))
        return self._read(token_id)

    def check(self, secret: str) -> Token:
        """The token of a secret that is right and not expired; it may be used up. Raises RefusedError."""
        token_id, _, own = secret.partition(".")
        with self._lock:
            row = self._database.execute("SELECT * FROM tokens WHERE id=?", (token_id,)).fetchone()
        expected = row["secret_sha256"] if row else _hash("")
        if not hmac.compare_digest(_hash(own), expected) or not row or row["expires"] < time.time():
            raise RefusedError(NOT_VALID, remedy="ask the fleet's operator for a new one")
        return _token(row)

    def use(self, secret: str) -> Token:
        token = self.check(secret)
        with self._lock:
            cursor = self._database.execute(
                "UPDATE tokens SET uses_left=uses_left-1 WHERE id=? AND uses_left>0", (token.id,)
            )
        if not cursor.rowcount:
            raise RefusedError(NOT_VALID, remedy="ask the fleet's operator for a new one")
        return token

    def _read(self, token_id: str) -> Token:
        with self._lock:
            row = self._database.execute("SELECT * FROM tokens WHERE id=?", (token_id,)).fetchone()
        if row is None:
            raise unknown_name("token", token_id, [t.id for t in self.all()])
        return _token(row)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _token(row: sqlite3.Row) -> Token:
    return Token(
        id=row["id"],
        uses_left=row["uses_left"],
        expires=row["expires"],
        group=row["group_name"],
        auto_approve=bool(row["auto_approve"]),
        created_at=row["created_at"],
    )
