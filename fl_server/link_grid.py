"""LinkGrid: the StreamGrid over the embedded SuperLink. Woken by stored replies; nothing here polls or sleeps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from flwr.app import Message

from fl_core.contracts.errors import RefusedError
from fl_core.flower.adapter import LinkStore, Run
from fl_core.flower.grid import StreamGrid
from fl_server.bell import Bell
from fl_server.directory import Directory

LONGEST_WAIT = 30.0  # a session that expires rings no bell


class LinkGrid(StreamGrid):
    """One run. ``adapter.assume_identity`` is process-wide: one grid at a time creates messages."""

    def __init__(self, store: LinkStore, bell: Bell, directory: Directory) -> None:
        self._store, self._bell, self._directory = store, bell, directory
        self._run = store.open_run()
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

    def wait_devices(self, count: int, timeout: float) -> None:
        """Block until ``count`` devices are online. Raises RefusedError naming who is absent after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with self._bell.condition:
            while len(online := self.device_names()) < count:
                left = deadline - time.monotonic()
                if left <= 0 or self._bell.closing:
                    raise self._absent(count, online)
                self._bell.condition.wait(min(left, LONGEST_WAIT))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Flower's contract: an empty id for a message that could not be stored."""
        sent = list(messages)
        ids = self._store.push(self._run, sent)
        for message, message_id in zip(sent, ids, strict=True):
            if message_id is not None:
                self._asked[message_id] = message.metadata.dst_node_id
        self._bell.ring_devices(m.metadata.dst_node_id for m in sent)
        return [message_id or "" for message_id in ids]

    def wait_ready(self, message_ids: set[str], timeout: float) -> set[str]:
        deadline = time.monotonic() + timeout
        with self._bell.condition:
            while not (found := message_ids & self._store.ready(self._run).keys()):
                left = deadline - time.monotonic()
                if left <= 0 or self._bell.closing:
                    break
                self._bell.condition.wait(min(left, LONGEST_WAIT))
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Raises IntegrityError naming the device whose reply cannot be read."""
        ready, names = self._store.ready(self._run), self._directory.names()
        wanted = [i for i in message_ids if i in ready]
        return [self._store.load(ready[i], origin=names.get(self._asked.get(i, 0), "reply")) for i in wanted]

    def forget(self, message_ids: Iterable[str]) -> None:
        """A device that did not answer counts as offline until it is heard from: it costs one deadline, not several."""
        ids, ready = [i for i in message_ids if i], self._store.ready(self._run)
        with self._store.together():
            self._store.forget(ids, ready)
            for message_id in ids:
                node = self._asked.pop(message_id, None)
                if node is not None and message_id not in ready:
                    self._store.deactivate(node)

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
