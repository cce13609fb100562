"""The bell between the network side and the round engine: who waits for what, woken without polling."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

OnPush = Callable[[list[int]], None]


class Bell:
    """Threads wait for replies; long polls (coroutines) wait for messages. Both sides may be rung from anywhere."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.closing = False
        self._doors: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._listeners: list[OnPush] = []

    def on_push(self, listener: OnPush) -> None:
        """``listener(node ids)`` is called when messages have been stored for these nodes: a wake-up over MQTT, say."""
        self._listeners.append(listener)

    def door(self, node: int) -> asyncio.Event:
        """The event that a long poll of this node waits for; called in its event loop. A newer poll replaces an older."""
        event = asyncio.Event()
        self._doors[node] = (asyncio.get_running_loop(), event)
        return event

    def waits(self, node: int) -> bool:
        return node in self._doors

    def leave(self, node: int, event: asyncio.Event) -> bool:
        """True when this was the node's current poll."""
        if node in self._doors and self._doors[node][1] is event:
            del self._doors[node]
            return True
        return False

    def ring_devices(self, nodes: Iterable[int]) -> None:
        rung = list(nodes)
        for node in rung:
            if node in self._doors:
                loop, event = self._doors[node]
                loop.call_soon_threadsafe(event.set)
        for listener in self._listeners:
            listener(rung)

    def ring_doors(self) -> None:
        """End every long poll now, without a message: there is something to hear in the answer."""
        for node in list(self._doors):
            if (entry := self._doors.get(node)) is not None:
                loop, event = entry
                loop.call_soon_threadsafe(event.set)

    def ring_engine(self) -> None:
        """A reply is complete, or a device came or went."""
        with self.condition:
            self.condition.notify_all()

    def close(self) -> None:
        self.closing = True
        self.ring_devices(list(self._doors))
        self.ring_engine()
