"""StreamGrid: Flower's Grid with what a streaming round engine needs beside it.

Two grids implement it: the one over the embedded SuperLink (deployment) and the one that runs clients in this
process (simulation). Unmodified Flower strategies use only the methods of ``Grid``.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fl_core.contracts.errors import RefusedError


class StreamGrid(Grid):
    """A Grid that says which replies are complete, so that one is held in memory at a time."""

    @abstractmethod
    def device_names(self) -> Mapping[int, str]:
        """node id -> device name, of the devices that are online now."""

    @abstractmethod
    def wait_ready(self, message_ids: set[str], timeout: float) -> set[str]:
        """Block until at least one of these instructions has a complete reply; the empty set after ``timeout`` seconds."""

    @abstractmethod
    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop instructions and their replies: they have been counted, or the round is over."""

    def wait_devices(self, count: int, timeout: float) -> None:
        """Block until ``count`` devices are online. Raises RefusedError naming who is absent after ``timeout`` seconds."""
        online = sorted(self.device_names().values())
        if len(online) < count:
            raise RefusedError(
                f"{len(online)} clients, {count} needed", remedy="lower algorithm.min_clients or add clients"
            )

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Flower's blocking call, for unmodified strategies: replies in the order of the messages."""
        ids = list(self.push_messages(messages))
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        waiting, ready = {i for i in ids if i}, set[str]()
        while waiting and (left := deadline - time.monotonic()) > 0:
            got = self.wait_ready(waiting, left)
            ready |= got
            waiting -= got
        replies = list(self.pull_messages([i for i in ids if i in ready]))
        self.forget([i for i in ids if i])
        return replies
