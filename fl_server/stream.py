"""Asynchronous training: devices are kept busy, and each reply counts when it comes, however old its model is.

A "round" of the engine is one buffer of replies (``algorithm.buffer``) and makes one model. A device that has answered gets
the newest model at once; replies of older models carry their staleness and the model that they started from. What was
under way when a server was interrupted is given up and asked again: a run is resumed at the end of its last buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import MessageType, RecordDict

from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.flower.grid import StreamGrid
from fl_server.exchange import GRACE_SECONDS
from fl_server.selection import Selector
from fl_server.tally import Tally

LOOK_AROUND_S = 30.0  # a device that comes online meanwhile is asked after so long at the latest


@dataclass(frozen=True)
class Asked:
    """An instruction that a device works on. version: of the model it was sent; at: the grid's time then."""

    name: str
    version: int
    at: float


class Stream:
    """request(version, name) -> what a device is sent. Keeps each model that some device still works on, and no other."""

    def __init__(
        self,
        grid: StreamGrid,
        settings: AlgorithmConfig,
        selector: Selector,
        request: Callable[[int, str], RecordDict],
        *,
        stop: threading.Event,
    ) -> None:
        self._grid, self._settings, self._selector, self._request, self._stop = grid, settings, selector, request, stop
        self._asked: dict[str, Asked] = {}
        self._models: dict[int, Arrays] = {}
        self._had = set[str]()  # devices that were sent the newest model
        self._sent = 0

    def fill(self, tally: Tally) -> None:
        """Count replies until the buffer is full; fewer when none comes within ``algorithm.deadline_s``."""
        record, version = tally.record, tally.record.round
        self._models[version], self._had = tally.reference, set()
        quiet_since = self._grid.now()
        while len(record.clients) < self._settings.buffer:
            self._send(tally, version)
            left = quiet_since + self._settings.deadline_s - self._grid.now()
            if left <= 0:
                break
            if not self._asked:
                if not self._grid.wait_change(left, self._stop):
                    record.failed = "no device may take part"
                    break
                continue
            oldest = min(asked.at for asked in self._asked.values()) + self._settings.deadline_s
            patience = max(0.0, min(left, oldest - self._grid.now(), LOOK_AROUND_S))
            arrived = self._grid.wait_ready(set(self._asked), patience, self._stop)
            for message_id in self._grid.by_arrival(arrived):
                self._count(tally, message_id, version)
                quiet_since = self._grid.now()
                if len(record.clients) == self._settings.buffer:
                    break
            self._give_up(tally)
        in_use = {asked.version for asked in self._asked.values()}
        self._models = {v: arrays for v, arrays in self._models.items() if v in in_use}

    def _send(self, tally: Tally, version: int) -> None:
        """The newest model to devices that are free, have not had it, and have not answered in this buffer."""
        nodes = {name: node for node, name in self._grid.device_names().items()}
        busy = {asked.name for asked in self._asked.values()}
        seen = {*busy, *tally.record.clients, *tally.record.refused, *self._had}
        free = [name for name in nodes if name not in seen]
        wanted = (self._settings.clients_per_round or len(nodes)) - len(busy)
        if wanted <= 0 or not free:
            return
        self._sent += 1
        choice = self._selector.choose(free, wanted, round=self._sent)
        tally.record.skipped.update(choice.skipped)
        ttl = self._settings.deadline_s + GRACE_SECONDS
        for name in choice.chosen:
            self._sent += 1
            group = f"{MessageType.TRAIN}-{version}-{self._sent}"
            content = self._request(version, name)
            message = self._grid.create_message(content, MessageType.TRAIN, nodes[name], group, ttl=ttl)
            (message_id,) = self._grid.push_messages([message])
            if message_id:
                self._asked[message_id] = Asked(name, version, self._grid.now())
            self._had.add(name)

    def _count(self, tally: Tally, message_id: str, version: int) -> None:
        asked = self._asked.pop(message_id)
        try:
            if not self._grid.knows(asked.name):
                raise IntegrityError(f"{asked.name}: revoked, or registered no longer")
            found = list(self._grid.pull_messages([message_id]))
            if not found:
                raise IntegrityError(f"{asked.name}: no readable reply")
            staleness, most = version - asked.version, self._settings.max_staleness
            if most and staleness > most:
                raise IntegrityError(f"{asked.name}: trained on a model {staleness} models old, at most {most} count")
            tally.look(asked.name, found[0], base=self._models[asked.version], staleness=staleness)
        except IntegrityError as error:
            tally.record.refused[asked.name] = error.message
        self._grid.forget([message_id])

    def _give_up(self, tally: Tally) -> None:
        """Devices that have not answered within the deadline of their own instruction."""
        end = self._grid.now() - self._settings.deadline_s
        gone = {i: asked.name for i, asked in self._asked.items() if asked.at <= end}
        for message_id in gone:
            del self._asked[message_id]
        tally.record.late = sorted({*tally.record.late, *gone.values()})
        self._grid.forget(gone)

    def close(self) -> None:
        """Nothing that is still under way will count."""
        self._grid.forget(list(self._asked))
        self._asked.clear()


def check_mode(settings: AlgorithmConfig, algorithm: Any) -> None:
    """Raises InputError for an algorithm that cannot use updates of older models, and for what only rounds have."""
    if settings.mode == "async" and not algorithm.aggregator.asynchronous:
        raise InputError(
            f"algorithm {settings.name!r} needs the replies of one model: it has no algorithm.mode = 'async'",
            remedy="--set algorithm.name=fedbuff, or fedasync",
        )
    if settings.mode == "async" and (settings.over_select or settings.late != "drop"):
        key, usual = ("over_select", "0") if settings.over_select else ("late", "drop")
        raise InputError(
            f"algorithm.{key} is of rounds: algorithm.mode = 'async' counts each reply when it comes",
            remedy=f"--set algorithm.{key}={usual}, or algorithm.mode=sync",
        )
