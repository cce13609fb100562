"""What each client keeps between its messages (Flower's ``Context.state``): the recent in memory, the rest on disk."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from pathlib import Path

LIMIT = 64 << 20


class ClientStates:
    """node -> bytes, for the life of one run; at most ``limit`` bytes are in memory. Not thread-safe."""

    def __init__(self, folder: Path, *, limit: int = LIMIT) -> None:
        self._folder, self._limit, self._bytes = folder, limit, 0
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._file: sqlite3.Connection | None = None

    def get(self, node: int) -> bytes:
        """b"" for a client that keeps nothing."""
        if node in self._recent:
            self._recent.move_to_end(node)
            return self._recent[node]
        if self._file is None:
            return b""
        row = self._file.execute("SELECT state FROM states WHERE node = ?", (node,)).fetchone()
        return bytes(row[0]) if row else b""

    def put(self, node: int, state: bytes) -> None:
        self._bytes += len(state) - len(self._recent.pop(node, b""))
        if state:
            self._recent[node] = state
        if self._file is not None:
            self._file.execute("DELETE FROM states WHERE node = ?", (node,))
        while self._bytes > self._limit and self._recent:
            old, value = self._recent.popitem(last=False)
            self._bytes -= len(value)
            self._on_disk().execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (old, value))

    def _on_disk(self) -> sqlite3.Connection:
        if self._file is None:
            self._file = sqlite3.connect(self._folder / "states.db", isolation_level=None, check_same_thread=False)
            self._file.executescript(  # it does not outlive the run: nothing is to be recovered
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE states (node INTEGER PRIMARY KEY, state BLOB NOT NULL)"
            )
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
