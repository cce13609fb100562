"""What one training round has counted: the aggregator's state and the record, for replies in time and a round late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Message

from fl_core.algorithms.base import Aggregator, Update
from fl_core.contracts import arrays as array_format
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.flower.adapter import Partial
from fl_core.flower.grid import StreamGrid
from fl_core.flower.messages import Reply
from fl_server.cohort import CohortResult
from fl_server.exchange import Talk
from fl_server.history import RoundRecord
from fl_server.screening import read_reply, screen_update

Stale = Mapping[str, tuple[str, int]]  # device name -> (instruction id, round in which it was asked)


class Tally:
    """One at a time is in memory: a reply is screened, added to the sums and dropped.

    stale: instructions of the round before that were not answered in its time (``algorithm.late = "next"``). Such a
    reply counts with ``late_weight`` times its weight, and only if its device has no usable reply in this round.
    """

    def __init__(
        self, aggregator: Aggregator, settings: AlgorithmConfig, reference: Arrays, record: RoundRecord, stale: Stale
    ) -> None:
        self.aggregator, self.settings, self.reference, self.record = aggregator, settings, reference, record
        self.stale = dict(stale)
        self.state = aggregator.begin(record.round, reference)
        self._arrived: list[str] | None = None  # the stale replies that count, once that is decided

    def look(self, name: str, message: Message, *, base: Arrays | None = None, staleness: int = 0) -> int:
        """base, staleness: as of ``Update``, where the reply is of an older model."""
        reply = read_reply(message, name)
        self._add(name, reply, 1.0, base, staleness)
        if staleness:
            self.record.staleness[name] = staleness
        self.record.clients[name], self.record.num_examples[name] = dict(reply.metrics), reply.num_examples
        self.record.bytes_up[name] = sum(a.nbytes for part in (reply.arrays, reply.extra) for a in part.values())
        return self.record.bytes_up[name]

    def take(self, result: CohortResult) -> None:
        """What clients near by came to, all at once."""
        if result.state is not None:
            self.aggregator.merge(self.state, result.state)
        self.record.clients, self.record.num_examples = result.clients, result.num_examples
        self.record.refused = result.refused
        parts = (self.reference, self.aggregator.expected(self.reference))
        self.record.bytes_up = dict.fromkeys(result.clients, sum(a.nbytes for part in parts for a in part.values()))

    def _add(self, name: str, reply: Reply, factor: float, base: Arrays | None = None, staleness: int = 0) -> None:
        reference = self.reference if base is None else base
        screen_update(reply, reference, name, max_norm=self.settings.max_update_norm)
        self.aggregator.screen(reply.extra, reference, origin=name)
        weight = float(reply.num_examples) * factor
        update = Update(arrays=reply.arrays, weight=weight, extra=reply.extra, base=base, staleness=staleness)
        self.aggregator.add(self.state, update)

    # across a restart

    def facts(self) -> dict[str, Any]:
        record = self.record
        return {
            "clients": record.clients,
            "num_examples": record.num_examples,
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
            "population": self.aggregator.population,
            "skipped": record.skipped,
            "arrived": self._arrived,
        }

    def partial(self) -> Partial | None:
        """The sums so far; None where the algorithm holds whole updates: these stay in the store until the round ends."""
        return None if self.state.held else array_format.pieces(self.aggregator.save(self.state))

    def take_up(self, talk: Talk) -> None:
        """What an interrupted engine had counted and decided in this round."""
        noted = talk.noted
        self.record.skipped = dict(noted.get("skipped", {}))
        self._arrived = noted.get("arrived")
        self.record.bytes_down = int(noted.get("bytes_down", 0))
        self.aggregator.population = int(noted.get("population", self.aggregator.population))
        if talk.exchange is not None and talk.exchange.partial:
            table = array_format.from_bytes(talk.exchange.partial, origin=f"round {self.record.round}")
            state = self.aggregator.load(table, self.reference)
            if state is None:
                raise IntegrityError(f"round {self.record.round}: its partial result holds no sums")
            self.state = state
            counted = talk.counted
            self.record.clients, self.record.num_examples = dict(counted["clients"]), dict(counted["num_examples"])
            self.record.bytes_up = dict(counted.get("bytes_up", {}))

    # replies of the round before

    def decide_stale(self, grid: StreamGrid) -> None:
        """Which late replies are here now; noted with the end of the exchange, so that a restart decides the same."""
        ids = {i for i, _ in self.stale.values()}
        ready = grid.wait_ready(ids, 0.0) if ids else set()
        self._arrived = sorted(name for name, (i, _) in self.stale.items() if i in ready)

    def count_stale(self, grid: StreamGrid) -> None:
        for name in self._arrived or []:
            if name in self.stale and name not in self.record.clients:
                self._count_stale(grid, name, *self.stale[name])

    def _count_stale(self, grid: StreamGrid, name: str, message_id: str, asked_in: int) -> None:
        try:
            if not grid.knows(name):
                raise IntegrityError(f"{name}: revoked, or registered no longer")
            found = list(grid.pull_messages([message_id]))
            if not found:
                raise IntegrityError(f"{name}: no readable reply")
            self._add(name, read_reply(found[0], name), self.settings.late_weight)
            self.record.late_counted[name] = asked_in
        except IntegrityError as error:
            self.record.refused.setdefault(name, f"a round late: {error.message}")
