"""The slow, obvious twin of AppGrid: each message is copied and handed to the ClientApp, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_core.flower import adapter
from simulations.apps.client import generators_kept, message_seed, seed_everything
from simulations.grid import FIRST_NODE


class PlainGrid(Grid):
    def __init__(self, app: ClientApp, count: int, run_config: Mapping[str, Any], seed: int) -> None:
        self.app, self.seed, self.numbers = app, seed, dict.fromkeys(range(count), 0)
        self.contexts = {
            i: Context(1, FIRST_NODE + i, {"partition-id": i, "num-partitions": count}, RecordDict(), dict(run_config))
            for i in range(count)
        }
        self.replies: dict[str, Message] = {}
        self._run = adapter.empty_run(1)
        adapter.assume_identity(run_id=1, task_id=1, node_id=1)

    def set_run(self, run: adapter.Run) -> None:
        self._run = run

    @property
    def run(self) -> adapter.Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return [FIRST_NODE + i for i in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            reply = self.answer(message)
            pushed.append(message.metadata.message_id)
            self.replies[pushed[-1]] = reply
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def answer(self, message: Message) -> Message:
        i = message.metadata.dst_node_id - FIRST_NODE
        self.numbers[i] += 1
        adapter.set_message_id(message, f"plain-{i}-{self.numbers[i]}")
        with generators_kept():
            seed_everything(message_seed(self.seed, i, self.numbers[i]))
            return self.app(copy.deepcopy(message), self.contexts[i])
