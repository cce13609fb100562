"""Packets as they travel in MQTT messages, and the frames inside them: binary, bounded, read without trust.

Packet: version (1 byte), kind (1), session id (16), number (8, big-endian), then by kind
  HELLO         device's ephemeral key (32), SHA-256 of its public key's PEM (32)
  SERVER_HELLO  server's ephemeral key (32), length (2) and DER of its certificate, signature
  FINISH        length (2) and PEM of the device's public key, signature
  DATA, ACK     sealed: see ``channel``; the header is authenticated with them
  UNKNOWN       nothing: the server does not know this session (a hint, which the next handshake confirms)
Frame: kind (1), stream (4), length (2), that many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from fl_core.contracts.errors import IntegrityError

VERSION = 1
SESSION_BYTES = 16
PAYLOAD_LIMIT = 60 * 1024  # frames of one packet; the whole MQTT message stays under 64 KiB
PACKET_LIMIT = 64 * 1024
_HEADER = struct.Struct(">BB16sQ")
HEADER_BYTES = _HEADER.size
_FRAME = struct.Struct(">BIH")
FRAME_BYTES = _FRAME.size
_LENGTH = struct.Struct(">H")
TEXTS_LIMIT = 256


class Kind(IntEnum):
    HELLO = 1
    SERVER_HELLO = 2
    FINISH = 3
    DATA = 4
    ACK = 5
    UNKNOWN = 6


class FrameKind(IntEnum):
    OPEN = 1  # credit for the answer (4 bytes), method, path, then names and values of headers
    HEAD = 2  # status, then names and values of headers
    DATA = 3
    CREDIT = 4  # bytes more that may be sent (4)
    END = 5
    RESET = 6  # why, as text


@dataclass(frozen=True)
class Packet:
    kind: Kind
    session: bytes
    number: int
    body: bytes
    header: bytes


@dataclass(frozen=True)
class Frame:
    kind: FrameKind
    stream: int
    payload: bytes | memoryview

    @property
    def size(self) -> int:
        return FRAME_BYTES + len(self.payload)


def header(kind: Kind, session: bytes, number: int = 0) -> bytes:
    return _HEADER.pack(VERSION, kind, session, number)


def read_packet(data: bytes, *, origin: str) -> Packet:
    """Raises IntegrityError naming ``origin`` (a topic)."""
    if not HEADER_BYTES <= len(data) <= PACKET_LIMIT:
        raise IntegrityError(f"{origin}: {len(data):,} bytes are no packet of a tunnel")
    version, kind, session, number = _HEADER.unpack_from(data)
    if version != VERSION or kind not in Kind.__members__.values():
        raise IntegrityError(f"{origin}: version {version}, kind {kind} is no packet of a tunnel that is known here")
    return Packet(Kind(kind), session, number, data[HEADER_BYTES:], data[:HEADER_BYTES])


def write_frames(frames: Iterable[Frame]) -> bytes:
    return b"".join(part for f in frames for part in (_FRAME.pack(f.kind, f.stream, len(f.payload)), f.payload))


def read_frames(data: bytes, *, origin: str) -> Iterator[Frame]:
    """Raises IntegrityError for what is cut short or of an unknown kind."""
    place = 0
    while place < len(data):
        if len(data) - place < FRAME_BYTES:
            raise IntegrityError(f"{origin}: a frame is cut short")
        kind, stream, length = _FRAME.unpack_from(data, place)
        place += FRAME_BYTES
        if kind not in FrameKind.__members__.values() or len(data) - place < length:
            raise IntegrityError(f"{origin}: a frame of kind {kind} is unknown or cut short")
        yield Frame(FrameKind(kind), stream, data[place : place + length])
        place += length


def write_parts(*parts: bytes) -> bytes:
    """Each part behind its length. Raises IntegrityError for more than a packet holds."""
    if len(parts) > TEXTS_LIMIT or any(len(part) > 0xFFFF for part in parts):
        raise IntegrityError("the head of a request is too large")
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def read_parts(data: bytes, *, origin: str) -> list[bytes]:
    found, place = list[bytes](), 0
    while place < len(data):
        if len(data) - place < _LENGTH.size or len(found) >= TEXTS_LIMIT:
            raise IntegrityError(f"{origin}: the head is cut short or too long")
        (length,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        if len(data) - place < length:
            raise IntegrityError(f"{origin}: the head is cut short")
        found.append(data[place : place + length])
        place += length
    return found
