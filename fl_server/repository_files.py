"""The signed repository over HTTP, read only: regular files below metadata/ and targets/, with single byte ranges; and
what it offers at present, for devices that wait to hear of it.

Nothing here needs to be trusted: devices verify what they fetch against signatures (TUF).
"""

from __future__ import annotations

import contextlib
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from starlette.concurrency import iterate_in_threadpool
from starlette.responses import Response, StreamingResponse

from fl_core.contracts.errors import IntegrityError
from fl_core.delivery.names import read_index

FOLDERS = ("metadata", "targets")
ROOT_NAME = "metadata/1.root.json"
TIMESTAMP_NAME = "metadata/timestamp.json"
ROOT_LIMIT = 512 << 10
CHUNK = 256 << 10
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,254}")
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


class RepositoryFiles:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamp: tuple[int, int] | None = None
        self._generation: int | None = None

    def root_metadata(self) -> str | None:
        """The first root of trust as text; None while nothing is published."""
        path = self.folder / ROOT_NAME
        try:
            with path.open("rb") as file:
                return file.read(ROOT_LIMIT).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def generation(self) -> int | None:
        """Grows with each publication; None while nothing is published. Read anew only when the repository changed."""
        try:
            facts = (self.folder / TIMESTAMP_NAME).stat()
        except OSError:
            return None
        stamp = (facts.st_mtime_ns, facts.st_ino)
        if stamp != self._stamp:
            version = _version_in(self._metadata("timestamp.json"), "snapshot.json")
            self._generation, self._stamp = version, stamp
        return self._generation

    def offers(self) -> dict[str, dict[str, int]]:
        """application -> channel -> version, as far as the present metadata can be read."""
        snapshot = self._metadata(f"{_version_in(self._metadata('timestamp.json'), 'snapshot.json')}.snapshot.json")
        targets = self._metadata(f"{_version_in(snapshot, 'targets.json')}.targets.json").get("targets")
        found: dict[str, dict[str, int]] = {}
        for name, facts in targets.items() if isinstance(targets, dict) else ():
            application, _, file = name.partition("/")
            if "/" in file or not file.endswith(".json"):
                continue
            channel = file.removesuffix(".json")
            with contextlib.suppress(OSError, KeyError, TypeError, IntegrityError):
                data = (self.folder / "targets" / application / f"{facts['hashes']['sha256']}.{file}").read_bytes()
                index = read_index(data, application=application, channel=channel)
                found.setdefault(application, {})[channel] = index.version
        return found

    def _metadata(self, name: str) -> dict[str, Any]:
        """The signed part; empty where it cannot be read."""
        try:
            found = json.loads((self.folder / "metadata" / name).read_bytes())["signed"]
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

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


def _version_in(metadata: dict[str, Any], name: str) -> int | None:
    try:
        version = metadata["meta"][name]["version"]
    except (KeyError, TypeError):
        return None
    return version if type(version) is int else None


def _chunks(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while length > 0:
            data = file.read(min(CHUNK, length))
            if not data:
                return
            length -= len(data)
            yield data
