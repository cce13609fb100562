"""StreamGrid: Flower's Grid with what a streaming round engine needs beside it.

Two grids implement it: the one over the embedded SuperLink (deployment) and the one that runs clients in this
process (simulation). Unmodified Flower strategies use only the methods of ``Grid``.
"""

from __future__ import annotations

import json
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fl_core.contracts.errors import RefusedError
from fl_core.flower.adapter import Exchange, Partial, without


class StreamGrid(Grid):
    """A Grid that says which replies are complete, so that one is held in memory at a time."""

    @abstractmethod
    def device_names(self) -> Mapping[int, str]:
        """node id -> device name, of the devices that are online now."""

    @abstractmethod
    def wait_ready(self, message_ids: set[str], timeout: float, stop: threading.Event | None = None) -> set[str]:
        """Block until at least one of these instructions has a complete reply; the empty set after ``timeout`` seconds.

        What will never have one, because its device was shut out, is returned too.
        Raises Interrupted when the server ends, or when ``stop`` is set and the grid was woken.
        """

    def by_arrival(self, message_ids: set[str]) -> list[str]:
        """What ``wait_ready`` returned, in the order of the replies' arrival."""
        return sorted(message_ids)

    def now(self) -> float:
        """This grid's time in seconds, by which rounds and deadlines are measured; it never runs back."""
        return time.monotonic()

    def population(self) -> int:
        """How many devices the federation has, online or not."""
        return len(self.device_names())

    def knows(self, name: str) -> bool:
        """Whether a device of this name may take part (still)."""
        return name in self.device_names().values()

    @abstractmethod
    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop instructions and their replies: they have been counted, or the round is over."""

    # What an engine notes of its rounds, so that it can be interrupted. Here it lasts as long as the grid.

    @property
    def _noted(self) -> dict[str, Exchange]:
        return self.__dict__.setdefault("_exchanges", {})  # type: ignore[no-any-return]

    def send(self, exchange: Exchange, messages: Sequence[Message]) -> Exchange:
        """Send the messages of an exchange (one for each device it names) and keep it, with their ids in ``asked``."""
        ids = self.push_messages(messages)
        asked = dict(zip(exchange.asked, ids, strict=True))
        self._noted[exchange.group] = replace(exchange, asked=asked)
        return self._noted[exchange.group]

    def recall(self, group: str) -> Exchange | None:
        """The exchange of this group as it was last noted; None when it was never sent."""
        return self._noted.get(group)

    def note(
        self,
        exchange: Exchange,
        facts: Mapping[str, Any],
        *,
        partial: Partial | None = None,
        forget: Iterable[str] = (),
        late: Iterable[str] = (),
    ) -> None:
        """New facts of an exchange (and its partial result), and the end of instructions that it needs no longer.

        late: instructions that were not answered in time and are kept all the same.
        """
        before = self._noted.get(exchange.group, exchange)
        kept = before.partial if partial is None else b"".join(partial)
        self._noted[exchange.group] = replace(before, facts=json.loads(json.dumps(facts)), partial=kept)
        self.forget(forget)

    def end_rounds(self, through: int, kept: Iterable[str] = ()) -> None:
        """Every exchange up to this round is over: drop it, and its instructions but the ``kept`` ones."""
        for found in [e for e in self._noted.values() if e.round <= through]:
            del self._noted[found.group]
            self.forget(without((i for i in found.asked.values() if i), kept))

    def discard(self, exchange: Exchange) -> None:
        """Drop an exchange that belongs to something else."""
        self._noted.pop(exchange.group, None)
        self.forget([i for i in exchange.asked.values() if i])

    def wait_devices(self, count: int, timeout: float, stop: threading.Event | None = None) -> None:
        """Block until ``count`` devices are online. Raises RefusedError naming who is absent after ``timeout`` seconds.

        Raises Interrupted as ``wait_ready`` does.
        """
        online = sorted(self.device_names().values())
        if len(online) < count:
            raise RefusedError(
                f"{len(online)} clients, {count} needed", remedy="lower algorithm.min_clients or add clients"
            )

    def wait_change(self, timeout: float, stop: threading.Event | None = None) -> bool:
        """Block until devices may have come, gone or changed; False where nothing will change within ``timeout`` seconds."""
        return False

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Flower's blocking call, for unmodified strategies: replies in the order of the messages."""
        ids = list(self.push_messages(messages))
        deadline = self.now() + (timeout if timeout is not None else 1e9)
        waiting, ready = {i for i in ids if i}, set[str]()
        while waiting and (left := deadline - self.now()) > 0:
            got = self.wait_ready(waiting, left)
            ready |= got
            waiting -= got
        replies = list(self.pull_messages([i for i in ids if i in ready]))
        self.forget([i for i in ids if i])
        return replies
