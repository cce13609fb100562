"""Frames: a JSON header and raw blobs, for the pipe to the worker process and for replies kept on disk. No pickle."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from typing import IO, Any

from fl_core.contracts.errors import IntegrityError

MAGIC = b"FFF1"
HEADER_LIMIT = 16 << 20
FRAME_LIMIT = 4 << 30
_PREFIX = struct.Struct(">4sI")


def write_frame(stream: IO[bytes], header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    stream.writelines(parts(header, blobs))
    stream.flush()


def parts(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """Joined they are the frame."""
    head = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode()
    return [_PREFIX.pack(MAGIC, len(head)), head, *blobs]


def read_frame(stream: IO[bytes], *, origin: str) -> tuple[dict[str, Any], list[bytes]] | None:
    """None at a clean end of the stream. Raises IntegrityError for anything that is not a whole frame."""
    prefix = stream.read(_PREFIX.size)
    if not prefix:
        return None
    if len(prefix) < _PREFIX.size:
        raise IntegrityError(f"{origin}: the frame is cut short")
    magic, length = _PREFIX.unpack(prefix)
    if magic != MAGIC or length > HEADER_LIMIT:
        raise IntegrityError(f"{origin}: not a frame")
    header = _header(_exactly(stream, length, origin), origin)
    return header, [_exactly(stream, size, origin) for size in header.pop("sizes")]


def to_bytes(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    return b"".join(parts(header, blobs))


def from_bytes(data: bytes, *, origin: str) -> tuple[dict[str, Any], list[bytes]]:
    frame = read_frame(io.BytesIO(data), origin=origin)
    if frame is None:
        raise IntegrityError(f"{origin}: empty")
    return frame


def _header(data: bytes, origin: str) -> dict[str, Any]:
    try:
        header = json.loads(data)
        sizes = header["sizes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError(f"{origin}: the frame's header is not readable") from None
    if not isinstance(header, dict) or not isinstance(sizes, list) or not all(type(s) is int and s >= 0 for s in sizes):
        raise IntegrityError(f"{origin}: the frame's header has no sizes")
    if sum(sizes) > FRAME_LIMIT:
        raise IntegrityError(f"{origin}: the frame is over the limit of {FRAME_LIMIT:,} bytes")
    return header


def _exactly(stream: IO[bytes], size: int, origin: str) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise IntegrityError(f"{origin}: the frame is cut short")
    return data
