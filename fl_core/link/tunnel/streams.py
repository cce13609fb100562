"""Streams: requests and answers side by side in one channel, each bounded by the credit that its reader gives.

A device opens streams, numbered upwards; the server answers. Bytes are sent only against credit, so that neither side
holds more of a stream than its reader allowed, whatever the other one does.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fl_core.contracts.errors import IntegrityError
from fl_core.link.tunnel import packets
from fl_core.link.tunnel.packets import FRAME_BYTES, PAYLOAD_LIMIT, Frame, FrameKind

FIRST_CREDIT = 64 * 1024  # of a request's body, before anybody reads it
READ_WINDOW = 1 << 20
WRITE_LIMIT = 128 * 1024  # bytes that wait for credit before a writer has to wait
MAX_STREAMS = 8
REASON_LIMIT = 200
_NUMBER = struct.Struct(">I")
ORIGIN = "tunnel"


@dataclass(eq=False)
class Stream:
    """One request and its answer, as one side sees it. ``reason`` is set once it was reset by either side."""

    id: int
    may_send: int
    may_receive: int
    head: list[bytes] = field(default_factory=list)
    reason: str = ""
    ended_in: bool = False
    ended_out: bool = False
    incoming: deque[bytes] = field(default_factory=deque)
    outgoing: deque[memoryview] = field(default_factory=deque)
    waiting_in: int = 0
    waiting_out: int = 0
    end_sent: bool = False
    reading: bool = False
    owed: int = 0  # bytes read, for which no new credit was given yet

    @property
    def room(self) -> bool:
        """Whether a writer may go on."""
        return self.waiting_out < WRITE_LIMIT

    @property
    def finished(self) -> bool:
        return bool(self.reason) or (self.ended_in and self.end_sent)


class Streams:
    """``server`` True: the side that answers. Every method is called under one lock, or in one event loop."""

    def __init__(self, *, server: bool, changed: Callable[[Stream], None] = lambda stream: None) -> None:
        self._server, self._changed = server, changed
        self.open_streams: dict[int, Stream] = {}
        self._last = 0
        self._control: deque[Frame] = deque()

    # for readers and writers

    def open(self, head: list[bytes]) -> Stream:
        """A new request. Raises IntegrityError for a head that is too large or one request too many."""
        if len(self.open_streams) >= MAX_STREAMS:
            raise IntegrityError(f"{ORIGIN}: more than {MAX_STREAMS} requests at a time")
        payload = _NUMBER.pack(READ_WINDOW) + packets.write_parts(*head)
        if len(payload) > PAYLOAD_LIMIT - FRAME_BYTES:
            raise IntegrityError("the head of a request is too large")
        self._last += 1
        stream = Stream(self._last, FIRST_CREDIT, READ_WINDOW, reading=True)
        self.open_streams[stream.id] = stream
        self._control.append(Frame(FrameKind.OPEN, stream.id, payload))
        return stream

    def answer(self, stream: Stream, head: list[bytes]) -> None:
        if not stream.finished:
            self._control.append(Frame(FrameKind.HEAD, stream.id, packets.write_parts(*head)))

    def write(self, stream: Stream, data: bytes) -> None:
        """Queue bytes; wait for ``stream.room`` before the next ones."""
        if data and not stream.reason and not stream.ended_out:
            stream.outgoing.append(memoryview(data))  # cut without copying
            stream.waiting_out += len(data)

    def end(self, stream: Stream) -> None:
        stream.ended_out = True

    def read(self, stream: Stream, amount: int) -> bytes:
        """What is there now, at most ``amount`` bytes; empty when nothing is. Gives the sender new credit."""
        if not stream.reading:
            stream.reading = True
            self._give(stream, READ_WINDOW - stream.may_receive - stream.waiting_in)
        parts, size = [], 0
        while stream.incoming and size < amount:
            part = stream.incoming.popleft()
            if len(part) > amount - size:
                stream.incoming.appendleft(part[amount - size :])
                part = part[: amount - size]
            parts.append(part)
            size += len(part)
        stream.waiting_in -= size
        stream.owed += size
        if stream.owed >= READ_WINDOW // 4 and not stream.ended_in:
            self._give(stream, stream.owed)
            stream.owed = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def reset(self, stream: Stream, reason: str) -> None:
        """End both directions now."""
        if not stream.finished:
            self._control.append(Frame(FrameKind.RESET, stream.id, reason.encode()[:REASON_LIMIT]))
        self._drop(stream, reason)

    def abandon(self, reason: str) -> None:
        """The session is over: every stream ends, without a word to the other side."""
        for stream in list(self.open_streams.values()):
            self._drop(stream, reason)
            self._changed(stream)

    @property
    def speaks(self) -> bool:
        """Whether something other than bytes waits to be sent: credit after a ``read``, say."""
        return bool(self._control)

    # for the channel

    def next_payload(self, limit: int = PAYLOAD_LIMIT) -> bytes | None:
        """Frames for one packet, control first, then bytes of each stream in turn; None when there is nothing to send."""
        frames, size = list[Frame](), 0
        while self._control and (not frames or size + self._control[0].size <= limit):
            frames.append(self._control.popleft())
            size += frames[-1].size
        if not self._control:
            for stream in list(self.open_streams.values()):
                for frame in self._frames_of(stream, limit - size):
                    frames.append(frame)
                    size += frame.size
        return packets.write_frames(frames) if frames else None

    def take(self, payload: bytes) -> list[Stream]:
        """Frames that arrived. Returns the streams that the other side opened now. Raises IntegrityError."""
        opened = []
        for frame in packets.read_frames(payload, origin=ORIGIN):
            if frame.kind == FrameKind.OPEN:
                if (stream := self._opened(frame)) is not None:
                    opened.append(stream)
                continue
            found = self.open_streams.get(frame.stream)
            if found is None:
                if frame.stream > self._last:
                    raise IntegrityError(f"{ORIGIN}: stream {frame.stream} was never opened")
                continue  # it was reset here, which the other side did not know yet
            self._apply(found, frame)
            self._forget_finished(found)
            self._changed(found)
        return opened

    # inside

    def _opened(self, frame: Frame) -> Stream | None:
        if not self._server or frame.stream <= self._last or len(frame.payload) < _NUMBER.size:
            raise IntegrityError(f"{ORIGIN}: stream {frame.stream} cannot be opened")
        self._last = frame.stream
        (credit,) = _NUMBER.unpack_from(frame.payload)
        stream = Stream(frame.stream, min(credit, READ_WINDOW), FIRST_CREDIT)
        stream.head = packets.read_parts(bytes(frame.payload[_NUMBER.size :]), origin=ORIGIN)
        if len(self.open_streams) >= MAX_STREAMS:
            self.reset(stream, "too many requests at a time")
            return None
        self.open_streams[stream.id] = stream
        return stream

    def _apply(self, stream: Stream, frame: Frame) -> None:
        if frame.kind == FrameKind.HEAD:
            if self._server or stream.head:
                raise IntegrityError(f"{ORIGIN}: an answer that nobody asked for")
            stream.head = packets.read_parts(bytes(frame.payload), origin=ORIGIN)
        elif frame.kind == FrameKind.DATA:
            if len(frame.payload) > stream.may_receive or stream.ended_in:
                raise IntegrityError(f"{ORIGIN}: more bytes than were asked for")
            stream.may_receive -= len(frame.payload)
            stream.incoming.append(bytes(frame.payload))
            stream.waiting_in += len(frame.payload)
        elif frame.kind == FrameKind.CREDIT:
            stream.may_send += _credit(frame.payload)
        elif frame.kind == FrameKind.END:
            stream.ended_in = True
        else:
            self._drop(stream, bytes(frame.payload).decode("utf-8", "replace")[:REASON_LIMIT] or "reset")

    def _frames_of(self, stream: Stream, room: int) -> list[Frame]:
        frames = []
        while stream.outgoing and stream.may_send > 0 and room > FRAME_BYTES:
            data = self._cut(stream, min(room - FRAME_BYTES, stream.may_send))
            frames.append(Frame(FrameKind.DATA, stream.id, data))
            room -= frames[-1].size
        if stream.ended_out and not stream.outgoing and not stream.end_sent and room >= FRAME_BYTES:
            stream.end_sent = True
            frames.append(Frame(FrameKind.END, stream.id, b""))
            self._forget_finished(stream)
        if frames:
            self._changed(stream)
        return frames

    def _cut(self, stream: Stream, size: int) -> memoryview:
        part = stream.outgoing.popleft()
        if len(part) > size:
            stream.outgoing.appendleft(part[size:])
            part = part[:size]
        stream.waiting_out -= len(part)
        stream.may_send -= len(part)
        return part

    def _give(self, stream: Stream, amount: int) -> None:
        if amount > 0 and not stream.finished and not stream.ended_in:
            stream.may_receive += amount
            self._control.append(Frame(FrameKind.CREDIT, stream.id, _NUMBER.pack(amount)))

    def _drop(self, stream: Stream, reason: str) -> None:
        stream.reason = stream.reason or reason or "reset"
        stream.outgoing.clear()
        stream.waiting_out = 0
        self.open_streams.pop(stream.id, None)

    def _forget_finished(self, stream: Stream) -> None:
        if stream.finished:
            self.open_streams.pop(stream.id, None)


def _credit(payload: bytes | memoryview) -> int:
    if len(payload) != _NUMBER.size:
        raise IntegrityError(f"{ORIGIN}: a credit that is no number")
    return min(int(_NUMBER.unpack(payload)[0]), READ_WINDOW)
