"""A TCP proxy in this process that breaks links as networks do: resets, latency, stalls, half-open connections, silence.

It needs no rights and no kernel module, so these faults run on every machine. Loss of single packets cannot be made
above TCP: ``tests/lossy_link.py`` does that below it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close() sends a reset


class _Flow:
    """One connection's bytes in one direction, on their way."""

    def __init__(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        self.source, self.sink, self.up = source, sink, up
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.ended = False


class TcpProxy:
    """Listens on ``port`` before ``target``. The attributes may be changed at any time, from any thread.

    delay_s: one-way latency. open: False = nothing passes any more and new connections get no answer, but no side is
    told (a partition, a half-open connection). refusing: new connections are reset at once. cut_after: bytes of the
    devices' direction (``up``) or the other, after which every connection is reset, once.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.delay_s, self.open, self.refusing = 0.0, True, False
        self.cut_after: tuple[bool, int] | None = None  # (up, bytes)
        self.passed = {True: 0, False: 0}
        self.connections = 0
        self._flows: list[_Flow] = []
        self._orphans: list[socket.socket] = []  # open, and nobody reads them
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self.reset()
        for end in [*self._orphans, self._listener]:
            end.close()

    def reset(self) -> None:
        """Reset every connection now, on both sides."""
        with self._lock:
            for end in {end for flow in self._flows for end in (flow.source, flow.sink)}:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.close()
            self._flows.clear()

    def forget_server_side(self) -> None:
        """The server's host vanished and came back: devices hold connections that nobody else knows of."""
        with self._lock:
            for flow in self._flows:
                if flow.up:
                    with contextlib.suppress(OSError):
                        flow.sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    flow.sink.close()
                    self._orphans.append(flow.source)
            self._flows.clear()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                sources = {flow.source: flow for flow in self._flows if not flow.ended} if self.open else {}
            readable, _, _ = select.select([self._listener, *sources], [], [], 0.005)
            with self._lock:
                for ready in readable:
                    if ready is self._listener:
                        if self.open:
                            self._accept()
                    elif sources[ready] in self._flows:
                        self._read(sources[ready])
                if self.open:
                    self._deliver()
            if not self.open:
                self._stop.wait(0.005)  # what arrives meanwhile waits in the sockets

    def _accept(self) -> None:
        device, _ = self._listener.accept()
        server = None
        if not self.refusing:
            with contextlib.suppress(OSError):
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        if server is None:
            device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            device.close()
            return
        self.connections += 1
        for end in (device, server):
            end.settimeout(30)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._flows += [_Flow(device, server, True), _Flow(server, device, False)]

    def _read(self, flow: _Flow) -> None:
        try:
            data = flow.source.recv(64 << 10)
        except OSError:
            self._end(flow)
            return
        flow.ended = not data
        flow.waiting.append((time.monotonic() + self.delay_s, data))

    def _deliver(self) -> None:
        now = time.monotonic()
        for flow in list(self._flows):
            while flow.waiting and flow.waiting[0][0] <= now and flow in self._flows:
                self._pass(flow, flow.waiting.popleft()[1])

    def _pass(self, flow: _Flow, data: bytes) -> None:
        try:
            if data:
                flow.sink.sendall(data)
                self.passed[flow.up] += len(data)
                if self.cut_after is not None and self.cut_after[0] == flow.up:
                    self._count(len(data))
            else:
                self._end(flow)
        except OSError:
            self._end(flow)

    def _count(self, size: int) -> None:
        assert self.cut_after is not None
        up, left = self.cut_after
        self.cut_after = (up, left - size)
        if left - size <= 0:
            self.cut_after = None
            self.reset()

    def _end(self, flow: _Flow) -> None:
        for other in [f for f in self._flows if f.source in (flow.source, flow.sink)]:
            self._flows.remove(other)
            other.source.close()


@contextmanager
def proxy_to(port: int) -> Iterator[TcpProxy]:
    proxy = TcpProxy(port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
