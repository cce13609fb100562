"""A scripted grid for the round engine: devices answer by a function, time is the grid's own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, MessageType

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import Interrupted
from fl_core.flower import adapter
from fl_core.flower.grid import StreamGrid
from fl_core.flower.messages import Reply, Request
from fl_core.learning import seeding
from fl_server.engine import RoundEngine
from tests.helpers import small_config

NEVER = "never"
Answer = Reply | str | None  # a reply, an error's reason, or NEVER
INITIAL = {"w": np.linspace(-1, 1, 6).reshape(2, 3), "n": np.array(0, np.int64)}
NAMES = tuple(f"van-{i}" for i in range(5))


def honest(name: str, kind: str, request: Request) -> Answer:
    """Moves the model by what (name, round) determine; evaluates to its mean."""
    if kind == MessageType.EVALUATE:
        return Reply(num_examples=int(name[-1]) + 1, metrics={"mean": float(request.arrays["w"].mean())})
    rng = seeding.generator("device", name, request.round)
    arrays = {"w": request.arrays["w"] + rng.normal(size=(2, 3)), "n": request.arrays["n"] + 1}
    return Reply(num_examples=int(rng.integers(1, 100)), metrics={"loss": float(rng.uniform())}, arrays=arrays)


class ScriptedGrid(StreamGrid):
    """Devices that answer by a function; replies arrive one at a time in the order ``arrival`` gives to the names.

    Time is the grid's own ``clock``: waiting for a reply that never comes advances it.
    """

    def __init__(
        self,
        answer: Callable[[str, str, Request], Answer] = honest,
        *,
        names: Iterable[str] = NAMES,
        arrival: Callable[[list[str]], list[str]] = sorted,
        gone: frozenset[str] = frozenset(),
    ) -> None:
        self.answer, self.arrival, self.gone = answer, arrival, gone
        self.nodes = {100 + i: name for i, name in enumerate(names)}
        self.clock = 0.0
        self.sent: dict[str, Message] = {}
        self.ready: dict[str, Message] = {}
        self.forgotten: set[str] = set()
        self.asked: list[tuple[int, str, str]] = []  # (round, kind, device)
        self.largest_pull = 0
        self.counter = itertools.count(1)
        adapter.assume_identity(run_id=1, task_id=1, node_id=1)

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def now(self) -> float:
        return self.clock

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def device_names(self) -> Mapping[int, str]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = self.nodes[message.metadata.dst_node_id]
            if name in self.gone:
                ids.append("")
                continue
            ids.append(f"m{next(self.counter)}")
            adapter.set_message_id(message, ids[-1])
            self.sent[ids[-1]] = message
        return ids

    def wait_ready(self, message_ids: set[str], timeout: float, stop: threading.Event | None = None) -> set[str]:
        if stop is not None and stop.is_set():
            raise Interrupted("told to stop")
        assert timeout >= 0
        if found := message_ids & self.ready.keys():
            return found
        by_name = {self.nodes[self.sent[i].metadata.dst_node_id]: i for i in message_ids if i in self.sent}
        for name in self.arrival(sorted(by_name)):
            message = self.sent.pop(by_name[name])
            request = Request.from_record(message.content, origin=name)
            self.asked.append((request.round, message.metadata.message_type, name))
            answer = self.answer(name, message.metadata.message_type, request)
            if answer == NEVER:
                continue
            content: Any = Error(7, answer) if isinstance(answer, str) else answer.to_record()  # type: ignore[union-attr]
            self.ready[by_name[name]] = Message(content, reply_to=message)
            return {by_name[name]}
        self.clock += timeout
        return set()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self.ready[i] for i in list(message_ids) if i in self.ready]
        self.largest_pull = max(self.largest_pull, len(found))
        return found

    def forget(self, message_ids: Iterable[str]) -> None:
        ids = set(message_ids)
        self.forgotten |= ids
        for message_id in ids:
            self.ready.pop(message_id, None)
            self.sent.pop(message_id, None)


Start = Callable[..., RoundEngine]


@pytest.fixture
def start() -> Start:
    def build(out: Path, grid: ScriptedGrid, *overrides: str, rounds: int = 1, **options: Any) -> RoundEngine:
        app, config = small_config("toy_regression", "algorithm.deadline_s=30", *overrides)
        arguments: dict[str, Any] = {"start": None, "initial": INITIAL, "seed": 0, "stage": "federation", **options}
        return RoundEngine(grid=grid, application=app, config=config, num_rounds=rounds, out=out, **arguments)

    return build


def final(engine: RoundEngine) -> Arrays:
    return checkpoints.load(engine.run()).arrays


def only(*names: str) -> Callable[..., Answer]:
    """Everyone else is refused: what the model should be if only these counted."""
    return lambda name, kind, request: honest(name, kind, request) if name in names else "absent"
