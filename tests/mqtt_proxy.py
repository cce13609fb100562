"""A TCP proxy before a broker that reads MQTT: it counts, cuts connections, and does to messages what a hostile broker may."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PUBLISH, PUBACK = 3, 4
Tamper = Callable[[str, bytes], list[bytes]]  # (topic, payload) -> the payloads that are passed on instead


def honest(_topic: str, payload: bytes) -> list[bytes]:
    return [payload]


class MqttProxy:
    """Plain TCP, MQTT 3.1.1. ``tamper`` may be replaced at any time. bytes_down: payload bytes towards devices."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.tamper: Tamper = honest
        self.bytes_down = self.connections = 0
        self.cut_after: int | None = None  # of bytes_down: then the connection is reset, once
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._spawn(self._accept)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in list(self._threads):
            thread.join(10)

    def cut(self) -> None:
        """Reset every connection now."""
        for found in list(self._open):
            with contextlib.suppress(OSError):
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                device.close()
                continue
            self.connections += 1
            for end in (device, broker):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.add(end)
            lock = threading.Lock()
            self._spawn(self._relay, device, broker, lock, False)
            self._spawn(self._relay, broker, device, threading.Lock(), True)

    def _relay(self, source: socket.socket, sink: socket.socket, lock: threading.Lock, down: bool) -> None:
        try:
            with source.makefile("rb") as stream:
                while (packet := _read(stream)) is not None:
                    for data in self._changed(*packet, source, down):
                        with lock:
                            sink.sendall(data)
                    if down and self.cut_after is not None and self.bytes_down >= self.cut_after:
                        self.cut_after = None
                        self.cut()
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                self._open.discard(end)
            source.close()

    def _changed(self, first: int, body: bytes, source: socket.socket, down: bool) -> list[bytes]:
        if first >> 4 != PUBLISH:
            return [_write(first, body)]
        (length,) = struct.unpack_from(">H", body)
        head = 2 + length + (2 if first & 6 else 0)
        payload = body[head:]
        if down:
            self.bytes_down += len(payload)
        wanted = self.tamper(body[2 : 2 + length].decode(), payload)
        if not wanted and first & 6:  # a broker that lies: taken, and gone
            source.sendall(_write(PUBACK << 4, body[head - 2 : head]))
        return [_write(first, body[:head] + changed) for changed in wanted]


def _read(stream: object) -> tuple[int, bytes] | None:
    read = stream.read  # type: ignore[attr-defined]
    first = read(1)
    if not first:
        return None
    size = shift = 0
    while True:
        byte = read(1)
        if not byte:
            return None
        size |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            break
    body = read(size)
    return (first[0], body) if len(body) == size else None


def _write(first: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while True:
        size, digit = divmod(size, 128)
        length.append(digit | (128 if size else 0))
        if not size:
            return bytes([first]) + bytes(length) + body


@contextmanager
def proxy_before(port: int) -> Iterator[MqttProxy]:
    proxy = MqttProxy(port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
