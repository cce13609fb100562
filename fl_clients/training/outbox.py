"""Finished replies, on disk until the server has confirmed them: a crash or an outage never costs the work done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from fl_clients.training import frames
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire
from fl_core.flower.wire import WireReply
from fl_core.storage import atomic

log = logging.getLogger(__name__)


MAX_BYTES = 1 << 30
MAX_AGE_S = 30 * 86_400.0  # no run waits that long for a reply


class Outbox:
    """One file a reply, named after the instruction it answers; written whole or not at all.

    A reply that cannot be written (a full disk) waits in memory: it is handed in, unless this process ends before.
    Over ``max_bytes`` or ``max_age_s`` the oldest replies go, never the newest; ``dropped`` counts them since the start.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, max_age_s: float = MAX_AGE_S) -> None:
        self.folder, self._max_bytes, self._max_age = folder, max_bytes, max_age_s
        self.dropped = 0
        self._unwritten: dict[str, WireReply] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob(".*.tmp"):
            stray.unlink(missing_ok=True)

    def put(self, reply: WireReply) -> None:
        header = {"run_id": reply.run_id, "instruction_id": reply.instruction_id, "ids": list(reply.objects)}
        blobs = [reply.envelope, reply.tree, *reply.objects.values()]
        file = self._file(reply.instruction_id)
        try:
            atomic.write_parts(file, frames.parts(header, blobs), mode=0o600)
        except OSError as error:
            log.warning("%s: not written, kept in memory until the server has it: %s", file, error)
            self._unwritten[reply.instruction_id] = reply
        self._bound()

    def remove(self, instruction_id: str) -> None:
        self._unwritten.pop(instruction_id, None)
        self._file(instruction_id).unlink(missing_ok=True)

    def depth(self) -> int:
        return len(self._unwritten) + sum(1 for _ in self.folder.glob("*.reply"))

    def waiting(self, fresh: WireReply | None = None) -> Iterator[WireReply]:
        """Oldest first, one in memory at a time; ``fresh``, which was put just now, is not read again.

        A file that cannot be read is dropped (the server will deliver its instruction again).
        """
        for file in self._oldest_first():
            if fresh is not None and file == self._file(fresh.instruction_id):
                yield fresh
                continue
            try:
                yield parse_reply(*frames.from_bytes(file.read_bytes(), origin=str(file)), origin=str(file))
            except IntegrityError as error:
                log.warning("dropped an unreadable reply: %s", error.message)
                file.unlink(missing_ok=True)
        yield from list(self._unwritten.values())

    def _oldest_first(self) -> list[Path]:
        return sorted(self.folder.glob("*.reply"), key=lambda f: f.stat().st_mtime_ns)

    def _bound(self) -> None:
        files = self._oldest_first()
        size, oldest = sum(file.stat().st_size for file in files), time.time() - self._max_age
        for file in files[:-1]:
            facts = file.stat()
            if size <= self._max_bytes and facts.st_mtime >= oldest:
                break
            log.warning("outbox: dropped the reply %s, over the limit of size or age", file.stem[:16])
            file.unlink(missing_ok=True)
            self.dropped, size = self.dropped + 1, size - facts.st_size

    def _file(self, instruction_id: str) -> Path:
        if not wire.is_object_id(instruction_id):
            raise IntegrityError(f"{instruction_id[:80]!r} is not a message id")
        return self.folder / f"{instruction_id}.reply"


def parse_reply(header: dict[str, object], blobs: list[bytes], *, origin: str) -> WireReply:
    """A frame's header and blobs as a WireReply; every object is checked against its id."""
    ids, run_id, instruction = header.get("ids"), header.get("run_id"), header.get("instruction_id")
    if not isinstance(ids, list) or type(run_id) is not int or not isinstance(instruction, str):
        raise IntegrityError(f"{origin}: not a reply")
    if len(blobs) != len(ids) + 2:
        raise IntegrityError(f"{origin}: {len(blobs)} parts for {len(ids)} objects")
    objects = dict(zip(ids, blobs[2:], strict=True))
    if any(wire.object_id(content) != name for name, content in objects.items()):
        raise IntegrityError(f"{origin}: an object does not fit its id")
    return WireReply(run_id, instruction, blobs[0], blobs[1], objects)
