"""The signed repository over HTTP, read only: regular files below metadata/ and targets/, with single byte ranges.

Nothing here needs to be trusted: devices verify what they fetch against signatures (TUF).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import iterate_in_threadpool
from starlette.responses import Response, StreamingResponse

FOLDERS = ("metadata", "targets")
ROOT_NAME = "metadata/1.root.json"
ROOT_LIMIT = 512 << 10
CHUNK = 256 << 10
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,254}")
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


class RepositoryFiles:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def root_metadata(self) -> str | None:
        """The first root of trust as text; None while nothing is published."""
        path = self.folder / ROOT_NAME
        try:
            with path.open("rb") as file:
                return file.read(ROOT_LIMIT).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def respond(self, name: str, byte_range: str | None) -> Response:
        opened = self._open(name)
        if opened is None:
            return Response(status_code=404)
        file, size = opened
        start, end, status = 0, size, 200
        if byte_range is not None and (match := _RANGE.fullmatch(byte_range.strip())):
            start = int(match[1])
            end = min(size, int(match[2]) + 1) if match[2] else size
            if start >= end:
                file.close()
                return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
            status = 206
        headers = {"content-length": str(end - start), "accept-ranges": "bytes", "cache-control": "no-cache"}
        if status == 206:
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        body = iterate_in_threadpool(_chunks(file, start, end - start))
        return StreamingResponse(body, status, headers, media_type="application/octet-stream")

    def _open(self, name: str) -> tuple[BinaryIO, int] | None:
        """A regular file inside, no symbolic link on the way, or None."""
        parts = name.split("/")
        if len(parts) < 2 or parts[0] not in FOLDERS or not all(_PART.fullmatch(p) for p in parts):
            return None
        path = self.folder
        for part in parts:
            path = path / part
            if path.is_symlink():
                return None
        try:
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                return None
            return path.open("rb"), facts.st_size
        except OSError:
            return None


def _chunks(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while length > 0:
            data = file.read(min(CHUNK, length))
            if not data:
                return
            length -= len(data)
            yield data
