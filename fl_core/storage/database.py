"""SQLite as every store here opens it: WAL mode, full durability at commit, foreign keys on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any


def connect(path: Path, schema: str = "") -> sqlite3.Connection:
    """Open (or make) a database that survives kill -9 at any moment; may be shared between threads under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    if schema:
        connection.executescript(schema)
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, lock: AbstractContextManager[Any]) -> Iterator[None]:
    """All statements of the block take effect, or none; ``lock`` keeps other threads of this process out."""
    with lock:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
