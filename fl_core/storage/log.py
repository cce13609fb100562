"""An append-only log of JSON lines; a torn last line (power cut) is skipped by the reader and closed by the writer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class AppendLog:
    """Appends one JSON object a line; ``durable=True`` fsyncs each one."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._durable, self._lock = path, durable, threading.Lock()
        torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
        self._file = path.open("ab")
        if torn:
            self._file.write(b"\n")

    def append(self, entry: dict[str, Any], *, durable: bool = True) -> None:
        """durable: as the log is; False = this entry may be lost with the machine's power."""
        line = json.dumps(entry, sort_keys=True, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            if self._durable and durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry
