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
        adapter.assume_identity(run_id=1, task_id=1, node_id=1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        return adapter.empty_run(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [FIRST_NODE + i for i in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self.answer(message) for message in messages]

    def answer(self, message: Message) -> Message:
        i = message.metadata.dst_node_id - FIRST_NODE
        self.numbers[i] += 1
        adapter.set_message_id(message, f"plain-{i}-{self.numbers[i]}")
        with generators_kept():
            seed_everything(message_seed(self.seed, i, self.numbers[i]))
            return self.app(copy.deepcopy(message), self.contexts[i])
