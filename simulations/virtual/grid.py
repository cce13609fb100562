"""A StreamGrid on a virtual clock: replies come when the simulated device would have sent them.

It stands before another grid, which does the computing. Waiting for a reply advances the clock to its arrival, or to the
end of the waiting; nothing else does. So the server's own engine, selection, deadlines, over-selection and late replies
run unchanged, in virtual seconds:

    arrival = now + latency + request / down + examples / (speed * pace) + reply / up
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from fl_core.contracts.errors import Interrupted
from fl_core.flower import adapter
from fl_core.flower.grid import StreamGrid
from fl_core.flower.messages import CONFIG, MAX_STEPS
from simulations.virtual.fleet import Device, Fleet

EVALUATION_SPEED = 3.0  # examples evaluated in the time of one trained: no backward pass (about twice the forward one)
TRAINING_COPIES = 4  # of the model in memory while it is trained: weights, gradients, optimiser, the global model
BATCH = 64  # replies that are computed ahead and held in memory
STEP_S = 600.0  # in which devices may come and go, while too few are there
CLIENT_ERROR = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """One client's data and how it is gone through: training and validation examples, epochs, size of a batch."""

    train: int
    validation: int
    epochs: int
    batch_size: int

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.train // self.batch_size)


@dataclass(kw_only=True)
class Errand:
    """One message under way. arrival: of its reply; None = it never comes. done: the reply, once computed."""

    message: Message
    name: str
    arrival: float | None
    seconds: float
    refusal: str = ""
    done: Message | None = None


class VirtualGrid(StreamGrid):
    """inner: computes. work(name): of each client. partial: a client too slow for the deadline does fewer steps, and
    sends what it has (``algorithm.stragglers``); otherwise its reply is late.

    reply_bytes: of an update on the wire. online(name, time): whether a device has a network then; one without it when its
    reply is ready has dropped out. on_training(name, seconds, time): a device has trained for so long.
    """

    def __init__(
        self,
        inner: StreamGrid,
        fleet: Fleet,
        *,
        work: Callable[[str], Work],
        reply_bytes: int,
        deadline_s: float,
        partial: bool = False,
        online: Callable[[str, float], bool] = lambda name, time: True,
        on_training: Callable[[str, float, float], None] = lambda name, seconds, time: None,
    ) -> None:
        self._inner, self._fleet, self._work, self._reply_bytes = inner, fleet, work, reply_bytes
        self._deadline_s, self._partial, self._online, self._on_training = deadline_s, partial, online, on_training
        self._now = 0.0
        self._errands: dict[str, Errand] = {}
        self._ready: dict[str, Errand] = {}
        self._sizes: tuple[int, int] = (0, 0)  # identity of the last content, and its bytes

    def now(self) -> float:
        return self._now

    def start_at(self, seconds: float) -> None:
        """Go on at this time: what an interrupted simulation had come to."""
        self._now = seconds

    # sending

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = self.device_names()
        return [self._push(message, names[message.metadata.dst_node_id]) for message in messages]

    def _push(self, message: Message, name: str) -> str:
        errand_id = f"{message.metadata.group_id}/{name}"
        self._errands[errand_id] = self._errand(message, name)
        return errand_id

    def _errand(self, message: Message, name: str) -> Errand:
        device, size, work = self._fleet.device(name), self._size(message.content), self._work(name)
        round_ = int(message.content.config_records[CONFIG].get("server-round", 0))  # type: ignore[arg-type]
        speed = device.examples_per_second * self._fleet.pace(name, round_)
        carried = device.kind.latency_s + size / device.down_bytes_s
        seconds, refusal = 0.0, ""
        if message.metadata.message_type == MessageType.TRAIN:
            carried += self._reply_bytes / device.up_bytes_s
            examples = work.epochs * work.train
            if device.kind.memory_mb and TRAINING_COPIES * size > device.kind.memory_mb * 1e6:
                refusal = (
                    f"{name}: {device.kind.memory_mb:g} MB of memory do not hold {TRAINING_COPIES} copies of the model"
                )
                examples = 0
            elif self._partial and carried + examples / speed > self._deadline_s:
                steps = int((self._deadline_s - carried) * speed / max(1, work.batch_size))
                if 0 < steps < work.steps:
                    message = self._shortened(message, steps)
                    examples = min(examples, steps * work.batch_size)
            seconds = examples / speed
        else:
            seconds = work.validation / (EVALUATION_SPEED * speed)
        arrival = None if self._fleet.drops_out(name, message.metadata.group_id) else self._now + carried + seconds
        return Errand(message=message, name=name, arrival=arrival, seconds=seconds, refusal=refusal)

    def _size(self, content: RecordDict) -> int:
        """Bytes of the arrays; a round's messages share one content."""
        if self._sizes[0] != id(content):
            arrays = [a for record in content.array_records.values() for a in record.values()]
            total = sum(np.dtype(a.dtype).itemsize * math.prod(a.shape) for a in arrays)
            self._sizes = (id(content), total)
        return self._sizes[1]

    def _shortened(self, message: Message, steps: int) -> Message:
        content: dict[str, Any] = dict(message.content.items())
        content[CONFIG] = ConfigRecord({**message.content.config_records[CONFIG], MAX_STEPS: steps})
        meta = message.metadata
        return self.create_message(
            RecordDict(content), meta.message_type, meta.dst_node_id, meta.group_id, ttl=meta.ttl
        )

    # waiting

    def wait_ready(self, message_ids: set[str], timeout: float, stop: threading.Event | None = None) -> set[str]:
        """The next to arrive of these (several at once if they arrive together); advances the clock."""
        if stop is not None and stop.is_set():
            raise Interrupted("the simulation was told to stop")
        if found := message_ids & self._ready.keys():
            return found
        end = self._now + timeout
        while due := self._due(message_ids, end):
            self._now = max(self._now, due[0][0])
            arrived = {i for arrival, i in due if arrival <= self._now}
            for errand_id in sorted(arrived):
                errand = self._errands[errand_id]
                self._on_training(errand.name, errand.seconds, self._now)
                if not self._online(errand.name, self._now):
                    errand.arrival = None  # it dropped out
                    arrived.discard(errand_id)
            if arrived:
                self._compute(
                    [i for _, i in due if i in arrived or self._errands[i].done is None][:BATCH], arrived, stop
                )
                self._ready.update({i: self._errands.pop(i) for i in arrived})
                return arrived
        self._now = end
        return set()

    def _due(self, message_ids: set[str], end: float) -> list[tuple[float, str]]:
        found = ((self._errands[i].arrival, i) for i in message_ids if i in self._errands)
        return sorted((arrival, i) for arrival, i in found if arrival is not None and arrival <= end)

    def _compute(self, ahead: Iterable[str], needed: set[str], stop: threading.Event | None) -> None:
        """The replies of those that are needed, and, while at it, of the next to come: workers work on many at once."""
        missing = [i for i in needed if self._errands[i].done is None]
        if not missing:
            return
        wanted = [self._errands[i] for i in dict.fromkeys([*sorted(missing), *ahead]) if self._errands[i].done is None]
        for errand in wanted:
            if errand.refusal:
                errand.done = Message(Error(CLIENT_ERROR, errand.refusal), reply_to=_with_id(errand.message))
        wanted = [e for e in wanted if e.done is None]
        ids = dict(zip(self._inner.push_messages([e.message for e in wanted]), wanted, strict=True))
        waiting = set(ids)
        while waiting:
            got = self._inner.wait_ready(waiting, 1e9, stop)
            for inner_id in got:
                found = list(self._inner.pull_messages([inner_id]))
                ids[inner_id].done = found[0] if found else None
            waiting -= got
        self._inner.forget(ids)

    def by_arrival(self, message_ids: set[str]) -> list[str]:
        return sorted(message_ids, key=lambda i: (self._ready[i].arrival or 0.0, i))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self._ready.pop(i) for i in list(message_ids) if i in self._ready]
        return [errand.done for errand in found if errand.done is not None]

    def forget(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._errands.pop(message_id, None)
            self._ready.pop(message_id, None)

    def wait_change(self, timeout: float, stop: threading.Event | None = None) -> bool:
        """Devices come and go with time: let some pass."""
        if stop is not None and stop.is_set():
            raise Interrupted("the simulation was told to stop")
        self._now += min(timeout, STEP_S)
        return timeout > 0

    def recall(self, group: str) -> adapter.Exchange | None:
        """An interrupted round is done again, from its beginning on the clock."""
        return None

    # as the inner grid says

    def device_names(self) -> Mapping[int, str]:
        return self._inner.device_names()

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def population(self) -> int:
        return self._inner.population()

    def knows(self, name: str) -> bool:
        return self._inner.knows(name)

    def set_run(self, run: adapter.Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> adapter.Run:
        return self._inner.run

    def device(self, name: str) -> Device:
        return self._fleet.device(name)


def _with_id(message: Message) -> Message:
    if not message.metadata.message_id:
        adapter.set_message_id(message, f"refused-{id(message)}")
    return message
