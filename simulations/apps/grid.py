"""The Grid of an unmodified ServerApp: its messages go to a pool of workers, its replies come back in its own order."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message

from fl_core.contracts.errors import InputError, Interrupted
from fl_core.flower import adapter
from fl_core.flower.adapter import apps as app_adapter
from fl_core.flower.grid import StreamGrid
from simulations.apps.client import Client, failed, message_seed
from simulations.apps.pool import Done, Task, Workers
from simulations.apps.states import ClientStates
from simulations.grid import FIRST_NODE

log = logging.getLogger(__name__)
RUN = 1
LOOK_AHEAD = 32  # waiting messages among which a worker looks for a client that it served before
IDLE_QUESTIONS, IDLE_GAP = 8, 3.0
REASONS_KEPT = 20


class Tally:
    """What came back through the grid: replies and failures by type of message, and the first reasons."""

    def __init__(self) -> None:
        self.replies: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.reasons: list[str] = []

    def add(self, reply: Message) -> None:
        kind = reply.metadata.message_type
        self.replies[kind] += 1
        if reply.has_error():
            self.failed[kind] += 1
            if len(self.reasons) < REASONS_KEPT:
                self.reasons.append(reply.error.reason or "no reason")


class AppGrid(StreamGrid):
    """``count`` clients with the node configuration of Flower's own simulation. Safe for several threads.

    A client answers one message at a time, in the order of its messages. A worker that dies costs its message one more
    try; then the reply is an error. on_reply is called after each reply.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        count: int,
        run_config: Mapping[str, Any],
        seed: int,
        states: ClientStates,
        on_reply: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self._workers, self._count, self._seed, self._states = workers, count, seed, states
        self._run_config, self._on_reply = dict(run_config), on_reply
        self._run = adapter.empty_run(RUN)
        self._changed, self._polling = threading.Condition(threading.Lock()), False
        self._sent: dict[str, Message] = {}
        self._queue: deque[str] = deque()
        self._at_work: set[int] = set()
        self._tried: set[str] = set()
        self._replies: dict[str, Message] = {}
        self._numbers: Counter[int] = Counter()  # messages by node
        self._served: dict[int, int] = {}  # node -> the worker that served it last
        self._batch, self._count_sent = 0, 0
        self._questions, self._asked_at = 0, 0.0
        self.tally = Tally()
        adapter.assume_identity(run_id=RUN, task_id=RUN, node_id=app_adapter.SERVER_NODE)

    def set_run(self, run: adapter.Run) -> None:
        self._run = run

    @property
    def run(self) -> adapter.Run:
        return self._run

    def get_node_ids(self) -> list[int]:
        """Raises InputError when the app asks again and again: it waits for clients that will never come."""
        if threading.current_thread() is threading.main_thread():
            now = time.monotonic()
            self._questions = self._questions + 1 if now - self._asked_at < IDLE_GAP else 1
            self._asked_at = now
            if self._questions > IDLE_QUESTIONS:
                raise InputError(
                    f"the app waits for more clients than the {self._count} that there are", remedy="--num-clients N"
                )
        return list(range(FIRST_NODE, FIRST_NODE + self._count))

    def device_names(self) -> Mapping[int, str]:
        return {FIRST_NODE + i: f"partition-{i}" for i in range(self._count)}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        with self._changed:
            self._batch += 1
            ids = [self._push(message) for message in messages]
            self._questions = 0
            self._dispatch()
        return ids

    def _push(self, message: Message) -> str:
        self._count_sent += 1
        message_id = f"message-{self._count_sent}"
        adapter.set_message_id(message, message_id)
        node = message.metadata.dst_node_id
        if FIRST_NODE <= node < FIRST_NODE + self._count:
            self._sent[message_id] = message
            self._queue.append(message_id)
        else:
            self._replies[message_id] = failed(message, app_adapter.UNKNOWN, f"no client has the node id {node}")
        return message_id

    def _dispatch(self) -> None:
        for worker in self._workers.idle():
            message_id = self._next(worker)
            if message_id is None:
                return
            message = self._sent[message_id]
            node = message.metadata.dst_node_id
            self._at_work.add(node)
            self._served[node] = worker
            self._workers.submit(worker, self._task(message_id, message))

    def _next(self, worker: int) -> str | None:
        """Of the clients that are not at work: one that this worker served last, or else one that no other serves."""
        free, unserved = None, False
        own: int | None = None
        while self._queue and self._queue[0] not in self._sent:
            self._queue.popleft()  # forgotten meanwhile
        for position, message_id in enumerate(self._queue):
            message = self._sent.get(message_id)
            if message is None or message.metadata.dst_node_id in self._at_work:
                continue
            served = self._served.get(message.metadata.dst_node_id)
            if served == worker:
                own = position
                break
            if free is None or (served is None and not unserved):
                free, unserved = position, served is None
            if position >= LOOK_AHEAD and free is not None:
                break
        chosen = free if own is None else own
        if chosen is None:
            return None
        found = self._queue[chosen]
        del self._queue[chosen]
        return found

    def _task(self, message_id: str, message: Message) -> Task:
        node = message.metadata.dst_node_id
        partition = node - FIRST_NODE
        if message_id not in self._tried:
            self._numbers[node] += 1
        client = Client(
            node=node,
            partition=partition,
            count=self._count,
            run=RUN,
            run_config=self._run_config,
            seed=message_seed(self._seed, partition, self._numbers[node]),
        )
        return Task(
            message_id=message_id, message=message, client=client, state=self._states.get(node), batch=self._batch
        )

    def _pump(self, timeout: float) -> None:
        """Under the lock; it is open while workers are waited for, and one thread at a time waits for them."""
        if self._polling:
            self._changed.wait(timeout)
            return
        self._polling = True
        self._changed.release()
        try:
            found = self._workers.poll(timeout)
        finally:
            self._changed.acquire()
            self._polling = False
        for done in found:
            self._finished(done)
        self._dispatch()
        self._changed.notify_all()

    def _finished(self, done: Done) -> None:
        task, node = done.task, done.task.client.node
        self._at_work.discard(node)
        reply = done.reply
        if reply is None and task.message_id not in self._tried:
            log.warning("a worker died; partition %d is asked again", task.client.partition)
            self._tried.add(task.message_id)
            self._queue.appendleft(task.message_id)
            return
        self._tried.discard(task.message_id)
        if reply is None:
            reason = f"partition {task.client.partition}: the worker process died over this message, twice"
            reply = failed(task.message, app_adapter.UNKNOWN, reason)
        else:
            self._states.put(node, done.state)
        adapter.set_message_id(reply, f"reply-{task.message_id}")
        self.tally.add(reply)
        if self._sent.pop(task.message_id, None) is not None:  # not forgotten meanwhile
            self._replies[task.message_id] = reply
        self._on_reply(self.tally)

    def wait_ready(self, message_ids: set[str], timeout: float, stop: threading.Event | None = None) -> set[str]:
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                if stop is not None and stop.is_set():
                    raise Interrupted("the simulation was told to stop")
                if ready := message_ids & self._replies.keys():
                    return ready
                left = deadline - time.monotonic()
                if left <= 0:
                    return set()
                self._pump(min(left, 1.0))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        with self._changed:
            self._pump(0)
            return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def recall(self, group: str) -> adapter.Exchange | None:
        return None

    def forget(self, message_ids: Iterable[str]) -> None:
        with self._changed:
            for message_id in message_ids:
                self._sent.pop(message_id, None)
                self._replies.pop(message_id, None)
