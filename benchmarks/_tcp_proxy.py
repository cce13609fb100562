"""A TCP proxy on loopback that counts the bytes of each connection in both directions, stalls and resets."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time
from dataclasses import dataclass, field

PIECE = 64 << 10
# IP and TCP with timestamps; each piece read is at least one segment, and one acknowledgement comes back for it.
HEAD_BYTES = 52


@dataclass
class Connection:
    """up: towards the server. pieces: reads in both directions. bursts: [begin, end, bytes with headers], a second of silence between two."""

    opened: float
    up: int = 0
    down: int = 0
    pieces: int = 0
    bursts: list[list[float]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.up + self.down

    @property
    def wire(self) -> int:
        """With headers and acknowledgements."""
        return self.total + 2 * HEAD_BYTES * self.pieces

    def count(self, amount: int, up: bool) -> None:
        now, size = time.monotonic(), amount + 2 * HEAD_BYTES
        self.pieces += 1
        if up:
            self.up += amount
        else:
            self.down += amount
        if self.bursts and now - self.bursts[-1][1] < 1.0:
            self.bursts[-1][1] = now
            self.bursts[-1][2] += size
        else:
            self.bursts.append([now, now, size])


class TcpProxy:
    """start() ... stop(). Its event loop has a thread of its own; ``target`` is a port on loopback."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = 0
        self.connections: list[Connection] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)

    def start(self) -> TcpProxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def stop(self) -> None:
        self.reset()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def reset(self) -> None:
        """Every connection ends with a TCP reset, now."""
        self._loop.call_soon_threadsafe(self._reset)

    def stall(self, on: bool) -> None:
        """While it is on nothing passes, and nobody is told."""
        self._loop.call_soon_threadsafe(self._flowing.clear if on else self._flowing.set)

    def totals(self) -> dict[str, int]:
        found = list(self.connections)
        return {
            "up": sum(c.up for c in found),
            "down": sum(c.down for c in found),
            "wire": sum(c.wire for c in found),
            "connections": len(found),
        }

    async def _listen(self) -> asyncio.Server:
        self._flowing.set()
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # the loop closes sockets on its next turns

    def _reset(self) -> None:
        for writer in self._writers:
            found = writer.get_extra_info("socket")
            if found is not None:
                with contextlib.suppress(OSError):
                    found.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        known = Connection(time.monotonic())
        self.connections.append(known)
        try:
            onward, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        try:
            ways = (self._copy(reader, back, known, True), self._copy(onward, writer, known, False))
            tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._writers -= {writer, back}
            for each in (writer, back):
                each.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, known: Connection, up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                await self._flowing.wait()
                known.count(len(data), up)
                writer.write(data)
                await writer.drain()
