"""LinkGrid: the StreamGrid over the embedded SuperLink. Woken by stored replies; nothing here polls or sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message

from fl_core.contracts.errors import Interrupted, RefusedError
from fl_core.flower.adapter import Exchange, LinkStore, Partial, Run
from fl_core.flower.grid import StreamGrid
from fl_server.bell import Bell
from fl_server.directory import Directory

LONGEST_WAIT = 30.0  # a session that expires rings no bell


class LinkGrid(StreamGrid):
    """One run, by its name: a grid of the same name goes on where an earlier one stopped, in another process too."""

    def __init__(self, store: LinkStore, bell: Bell, directory: Directory, name: str) -> None:
        self._store, self._bell, self._directory = store, bell, directory
        self._run = store.open_run(name)
        self._asked: dict[str, int] = {}  # instruction id -> node id, of what is not forgotten yet

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> list[int]:
        return sorted(self.device_names())

    def device_names(self) -> Mapping[int, str]:
        names = self._directory.names()
        return {node: names[node] for node in self._store.online() if node in names}

    def population(self) -> int:
        return len(self._directory.names())

    def wait_devices(self, count: int, timeout: float, stop: threading.Event | None = None) -> None:
        deadline = time.monotonic() + timeout
        with self._bell.condition:
            while len(online := self.device_names()) < count:
                self._check(stop)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._absent(count, online)
                self._bell.condition.wait(min(left, LONGEST_WAIT))

    def wait_change(self, timeout: float, stop: threading.Event | None = None) -> bool:
        with self._bell.condition:
            self._check(stop)
            if timeout > 0:
                self._bell.condition.wait(min(timeout, LONGEST_WAIT))
            self._check(stop)
        return timeout > 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Flower's contract: an empty id for a message that could not be stored."""
        return self._push(list(messages), None)

    def _push(self, sent: list[Message], exchange: Exchange | None) -> list[str]:
        ids = self._store.push(self._run, sent, exchange)
        for message, message_id in zip(sent, ids, strict=True):
            if message_id is not None:
                self._asked[message_id] = message.metadata.dst_node_id
        self._bell.ring_devices(m.metadata.dst_node_id for m in sent)
        return [message_id or "" for message_id in ids]

    def wait_ready(self, message_ids: set[str], timeout: float, stop: threading.Event | None = None) -> set[str]:
        deadline = time.monotonic() + timeout
        with self._bell.condition:
            while True:
                self._check(stop)
                if found := message_ids & self._store.ready(self._run).keys() | self._shut_out(message_ids):
                    return found
                left = deadline - time.monotonic()
                if left <= 0:
                    return set()
                self._bell.condition.wait(min(left, LONGEST_WAIT))

    def _check(self, stop: threading.Event | None) -> None:
        if self._bell.closing or (stop is not None and stop.is_set()):
            raise Interrupted("the run was told to stop", remedy="start it again: it goes on in the same round")

    def _shut_out(self, message_ids: set[str]) -> set[str]:
        """Instructions to devices that were revoked meanwhile: no reply of theirs is taken, so nobody waits for it."""
        names = self._directory.names()
        return {i for i in message_ids if (node := self._asked.get(i)) is not None and node not in names}

    def by_arrival(self, message_ids: set[str]) -> list[str]:
        arrived = [i for i in self._store.ready(self._run) if i in message_ids]
        return [*arrived, *sorted(message_ids.difference(arrived))]

    def knows(self, name: str) -> bool:
        return self._directory.registered(name)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Raises IntegrityError naming the device whose reply cannot be read."""
        ready, names = self._store.ready(self._run, message_ids), self._directory.names()
        return [self._store.load(m, origin=names.get(self._asked.get(i, 0), "reply")) for i, m in ready.items()]

    def forget(self, message_ids: Iterable[str]) -> None:
        ids = [i for i in message_ids if i]
        with self._store.together():
            self._silent(ids)
            self._store.forget(ids, self._store.ready(self._run))
        self._drop(ids)

    def _silent(self, message_ids: Iterable[str]) -> None:
        """A device that did not answer counts as offline until it is heard from: it costs one deadline, not several."""
        ready = self._store.ready(self._run)
        for message_id in message_ids:
            node = self._asked.get(message_id)
            if node is not None and message_id not in ready:
                self._store.deactivate(node)

    def send(self, exchange: Exchange, messages: Sequence[Message]) -> Exchange:
        ids = self._push(list(messages), exchange)
        return replace(exchange, asked=dict(zip(exchange.asked, ids, strict=True)))

    def recall(self, group: str) -> Exchange | None:
        found = self._store.exchange(self._run, group)
        if found is not None:
            self._asked.update({i: found.nodes[name] for name, i in found.asked.items() if i})
        return found

    def note(
        self,
        exchange: Exchange,
        facts: Mapping[str, Any],
        *,
        partial: Partial | None = None,
        forget: Iterable[str] = (),
        late: Iterable[str] = (),
    ) -> None:
        gone = list(forget)
        with self._store.together():
            self._silent([*gone, *late])
            self._store.note(self._run, exchange.group, facts, partial=partial, forget=gone)
        self._drop(gone)

    def _drop(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._asked.pop(message_id, None)

    def end_rounds(self, through: int, kept: Iterable[str] = ()) -> None:
        self._store.end_rounds(self._run, through, kept)

    def discard(self, exchange: Exchange) -> None:
        self._store.discard(self._run, exchange.group)

    def pending(self, group: str) -> dict[str, int]:
        """instruction id -> node id of what one group (a round) still holds in the store."""
        return self._store.pending(self._run, group)

    def close(self, *, completed: bool) -> None:
        self._store.close_run(self._run, completed=completed)

    def _absent(self, count: int, online: Mapping[int, str]) -> RefusedError:
        here = set(online.values())
        absent = sorted(set(self._directory.names().values()) - here)
        known = f"registered but absent: {', '.join(absent)}" if absent else "no other device is registered"
        return RefusedError(
            f"{len(here)} of {count} devices are online ({', '.join(sorted(here)) or 'none'}); {known}",
            remedy="start the agents ('fieldfleet agent run HOME'), register more devices, or lower --min-devices",
        )
