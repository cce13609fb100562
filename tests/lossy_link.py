"""A link between this machine and a network namespace that loses, delays, throttles and cuts packets as it is told.

``tc netem`` is not in every kernel, so the link is two TUN devices with a relay in this process between them: what it
drops or holds back are real IP packets, and both ends are the kernel's own TCP. It needs root, ``ip`` and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
HOST, INSIDE = "10.213.213.1", "10.213.213.2"
NEEDS = "this test makes a network namespace and two TUN devices: it needs root, 'ip' and /dev/net/tun"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{NEEDS}; ip {' '.join(words)}: {done.stderr.strip()}"


def tun(name: str) -> int:
    try:
        handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as error:
        raise AssertionError(f"{NEEDS}: {error}") from None
    return handle


class LossyLink:
    """loss: share of packets dropped in each direction. delay_s: one way. rate: bytes a second of each direction, 0 = as fast
    as it goes. up: False = every packet is dropped."""

    def __init__(self, seed: int = 0) -> None:
        self.loss, self.delay_s, self.rate, self.up = 0.0, 0.0, 0.0, True
        self._sent: dict[int, float] = {}  # end -> when what was given to it last is through
        self.lost = self.passed = 0
        self.namespace = f"fieldfleet-{os.getpid()}"
        self.interfaces = f"ffa{os.getpid()}"[:15], f"ffb{os.getpid()}"[:15]
        self._random, self._order = random.Random(seed), itertools.count()
        self._held: list[tuple[float, int, int, bytes]] = []
        self._stop = threading.Event()
        self._ends: tuple[int, int] = (-1, -1)
        self._thread = threading.Thread(target=self._relay, name="lossy-link", daemon=True)

    def start(self) -> None:
        outside, inside = self.interfaces
        ip("netns", "add", self.namespace)
        self._ends = tun(outside), tun(inside)
        ip("link", "set", inside, "netns", self.namespace)
        ip("addr", "add", f"{HOST}/30", "dev", outside)
        ip("link", "set", outside, "up")
        for words in (
            ("addr", "add", f"{INSIDE}/30", "dev", inside),
            ("link", "set", inside, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", self.namespace, *words)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)
        for end in self._ends:
            with contextlib.suppress(OSError):
                os.close(end)
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)

    def inside(self, program: list[str]) -> list[str]:
        """The command that runs ``program`` on the other side of the link."""
        return ["ip", "netns", "exec", self.namespace, *program]

    def _relay(self) -> None:
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        while not self._stop.is_set():
            wait = min(0.05, max(0.0, self._held[0][0] - time.monotonic())) if self._held else 0.05
            for end in select.select(self._ends, [], [], wait)[0]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._take(os.read(end, 65_536), other[end])
            while self._held and self._held[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(self._held)
                with contextlib.suppress(OSError):
                    os.write(end, packet)

    def _take(self, packet: bytes, to: int) -> None:
        if not self.up or self._random.random() < self.loss:
            self.lost += 1
            return
        self.passed += 1
        through = time.monotonic()
        if self.rate:
            through = max(through, self._sent.get(to, 0.0)) + len(packet) / self.rate
            self._sent[to] = through
        heapq.heappush(self._held, (through + self.delay_s, next(self._order), to, packet))


@contextmanager
def lossy_link() -> Iterator[LossyLink]:
    link = LossyLink()
    try:
        link.start()
        yield link
    finally:
        link.stop()
