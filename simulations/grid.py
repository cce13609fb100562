"""Flower Grids whose clients live on this machine: any Flower strategy and our round engine run over them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message

from fl_core.contracts.errors import Interrupted
from fl_core.flower import adapter
from fl_core.flower.grid import StreamGrid

Handler = Callable[[Message], Message]
FIRST_NODE = 1_000_000
SERVER_NODE = 1


class LocalGrid(StreamGrid):
    """What such grids have in common: a message waits here until its reply is waited for. Clients are never late.

    ``adapter.assume_identity`` is process-wide: one grid at a time creates messages.
    """

    def __init__(self) -> None:
        self._run = adapter.empty_run(1)
        self._sent: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._count = 0
        adapter.assume_identity(run_id=1, task_id=1, node_id=SERVER_NODE)

    @abstractmethod
    def _answer(self, message_ids: set[str], stop: threading.Event | None) -> dict[str, Message]:
        """Replies to the next of these messages, one or several, that are then no longer in ``_sent``."""

    def set_run(self, run: adapter.Run) -> None:
        self._run = run

    @property
    def run(self) -> adapter.Run:
        return self._run

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self._count += 1
            message_id = f"message-{self._count}"
            adapter.set_message_id(message, message_id)
            self._sent[message_id] = message
            ids.append(message_id)
        return ids

    def wait_ready(self, message_ids: set[str], timeout: float, stop: threading.Event | None = None) -> set[str]:
        if stop is not None and stop.is_set():
            raise Interrupted("the simulation was told to stop")
        ready = message_ids & self._replies.keys()
        if ready:
            return ready
        found = self._answer(message_ids, stop)
        self._replies.update(found)
        return set(found)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def recall(self, group: str) -> adapter.Exchange | None:
        """Replies are dropped as soon as they are read, so that memory stays flat: an interrupted round is done again."""
        return None

    def forget(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._sent.pop(message_id, None)
            self._replies.pop(message_id, None)


class InProcessGrid(LocalGrid):
    """clients: name -> handler of Flower messages, called in this process, one after the other: the plain twin of the
    grids over workers, and the one for clients that are no application's.
    """

    def __init__(self, clients: Mapping[str, Handler]) -> None:
        super().__init__()
        self._handlers = {FIRST_NODE + i: clients[name] for i, name in enumerate(sorted(clients))}
        self._names = {FIRST_NODE + i: name for i, name in enumerate(sorted(clients))}

    def get_node_ids(self) -> list[int]:
        return list(self._names)

    def device_names(self) -> Mapping[int, str]:
        return self._names

    def _answer(self, message_ids: set[str], stop: threading.Event | None) -> dict[str, Message]:
        for message_id, message in self._sent.items():
            if message_id in message_ids:
                del self._sent[message_id]
                return {message_id: self._handlers[message.metadata.dst_node_id](message)}
        return {}
