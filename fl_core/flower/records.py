"""Records on the wire: a 4-byte big-endian length and that many bytes, repeated. A message's envelope, then its objects."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire

_LENGTH = struct.Struct(">I")
HEAD_BYTES = _LENGTH.size


def head(content: bytes) -> bytes:
    return _LENGTH.pack(len(content))


def packed(contents: Iterable[bytes]) -> Iterator[bytes]:
    """The parts to send, in order; joined they are the body."""
    for content in contents:
        yield head(content)
        yield content


def packed_size(contents: Iterable[bytes]) -> int:
    return sum(HEAD_BYTES + len(content) for content in contents)


class RecordReader:
    """Cuts a stream into records as it arrives; holds at most one unfinished record.

    Limits: the first record (the envelope), every further one (an object), their number and their sum.
    """

    def __init__(self, *, origin: str) -> None:
        self._origin, self._buffer = origin, bytearray()
        self._count = self._total = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The records that are complete now. Raises IntegrityError as soon as a limit is passed."""
        self._buffer += data
        found = []
        while len(self._buffer) >= HEAD_BYTES:
            (length,) = _LENGTH.unpack_from(self._buffer)
            self._check(length)
            if len(self._buffer) < HEAD_BYTES + length:
                break
            found.append(bytes(self._buffer[HEAD_BYTES : HEAD_BYTES + length]))
            del self._buffer[: HEAD_BYTES + length]
            self._count += 1
            self._total += length
        return found

    def end(self) -> None:
        """Raises IntegrityError when the stream ended within a record."""
        if self._buffer:
            raise IntegrityError(f"{self._origin}: the message is cut short")

    def _check(self, length: int) -> None:
        limit = wire.MAX_OBJECT_BYTES if self._count else wire.MAX_ENVELOPE_BYTES
        if length > limit or self._count > wire.MAX_OBJECTS + 1 or self._total + length > wire.MAX_MESSAGE_BYTES:
            raise IntegrityError(f"{self._origin}: the message is too large")
