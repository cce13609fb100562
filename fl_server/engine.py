"""The round engine: drives an Aggregator over a StreamGrid, in deployment and in simulation alike.

Replies are counted in the order of device names, whatever the order of arrival, and one at a time, so that a
simulated and a deployed federation end in the same weights and memory does not grow with the number of clients.
A bad reply is refused with its reason; a missing one costs the round at most ``algorithm.deadline_s``. An engine that
was killed goes on in the same round: what it noted lies in the grid, what it finished in ``out``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType, RecordDict

from fl_core.algorithms import build_algorithm
from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint, Encoded
from fl_core.contracts.config import at_default, describes, to_table
from fl_core.contracts.counted import to_arrays as counted_arrays
from fl_core.contracts.errors import EnvironmentFault, IntegrityError, RefusedError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.flower.grid import StreamGrid
from fl_core.flower.messages import Request
from fl_core.learning.application import Application
from fl_core.learning.averaging import ModelAverage
from fl_core.learning.personal import personal_names
from fl_core.storage import atomic
from fl_server.cohort import CohortGrid
from fl_server.exchange import Plan, Talk
from fl_server.history import History, RoundRecord, weighted_mean
from fl_server.screening import read_reply
from fl_server.selection import Selector, UniformSelector
from fl_server.stream import Stream, check_mode
from fl_server.tally import Tally

log = logging.getLogger(__name__)
KEEP_ROUNDS = 3
STATE_NAME, STALE_NAME = "aggregator.safetensors", "late.json"


class RoundEngine:
    """``run()`` goes from ``start`` to the checkpoint ``out/final``; an interrupted ``out`` is taken up where it stood.

    on_round: called with each finished RoundRecord. selector: who is asked (default: uniformly).
    stop: when it is set (and the grid woken) the engine ends with Interrupted and can be run again. save_seconds: rounds
    that end sooner after the last checkpoint have none (the last one has); what was killed repeats them. evaluate_global(arrays) -> metrics: the server's own evaluation.
    """

    def __init__(
        self,
        *,
        grid: StreamGrid,
        application: Application,
        config: Any,
        start: Checkpoint | None,
        initial: Arrays,
        num_rounds: int,
        seed: int,
        out: Path,
        stage: str,
        on_round: Callable[[RoundRecord], None] | None = None,
        evaluate_global: Callable[[Arrays], dict[str, float]] | None = None,
        selector: Selector | None = None,
        stop: threading.Event | None = None,
        save_seconds: float = 0.0,
    ) -> None:
        self.grid, self.application, self.config = grid, application, config
        self.start, self.num_rounds, self.seed, self.out, self.stage = start, num_rounds, seed, out, stage
        self.on_round, self.evaluate_global = on_round, evaluate_global
        self.settings = config.algorithm
        self.selector = selector or UniformSelector(seed)
        algorithm = build_algorithm(config.algorithm)
        self.aggregator = algorithm.aggregator
        self.personal = personal_names(initial, self.settings.personal)
        self.stateful = algorithm.client_update.stateful or bool(self.personal)
        self._contents: dict[str, RecordDict] = {}
        self.counted: dict[str, int] = {}  # device -> the round of its update that was counted last
        self.average = ModelAverage(self.settings.average_last, num_rounds)
        self.arrays: Arrays = initial
        self.done = 0
        self.stop = stop or threading.Event()
        self.save_seconds, self._saved_at = save_seconds, -math.inf
        check_mode(self.settings, algorithm)
        self.stream: Stream | None = None
        if self.settings.mode == "async":
            self.stream = Stream(grid, self.settings, self.selector, self._asynchronous, stop=self.stop)
        self.stale: dict[str, tuple[str, int]] = {}
        self.seen: set[str] = set(start.manifest.clients_seen) if start else set()
        self.table = to_table(config)
        self._resume()
        self.history = History(out, resumed_round=self.done)
        for record in self.history.records:
            self.selector.note(record)
            self._note_counted(record)

    def run(self) -> Path:
        """All remaining rounds; returns the folder of the final checkpoint.

        Raises Interrupted when told to stop, EnvironmentFault on a full disk: both go on in the same round later.
        """
        try:
            for number in range(self.done + 1, self.num_rounds + 1):
                self._round(number)
            return self._finish()
        except OSError as error:
            if error.errno not in atomic.NO_SPACE:
                raise
            raise EnvironmentFault(f"{self.out}: {error.strerror}", remedy=atomic.NO_SPACE_REMEDY) from None
        finally:
            if self.stream is not None:
                self.stream.close()
            self.history.close()

    def _round(self, number: int) -> None:
        began, record = self.grid.now(), RoundRecord(round=number)
        self.aggregator.population = max(1, self.grid.population())
        tally = Tally(self.aggregator, self.settings, self.shared, record, self.stale)
        late = self._train(tally) if self.stream is None else self._fill(self.stream, tally)
        self._apply(tally)
        every = self.settings.evaluate_every
        if every and (number % every == 0 or number == self.num_rounds):
            self._evaluate(record) if self.stream is None else self._evaluated(record, {})
        record.seconds = self.grid.now() - began
        self.stale = {name: (i, number) for name, i in late.items()} if self.settings.late == "next" else {}
        self._save(number, record)
        self.grid.end_rounds(number, [i for i, _ in self.stale.values()])
        if self.on_round:
            self.on_round(record)

    @property
    def shared(self) -> Arrays:
        """The global model without the personal layers of the clients."""
        return {name: array for name, array in self.arrays.items() if name not in self.personal}

    def _fill(self, stream: Stream, tally: Tally) -> dict[str, str]:
        self._contents = {}
        extra = self.aggregator.outgoing(self.shared)
        tally.record.bytes_down = sum(a.nbytes for part in (self.arrays, extra) for a in part.values())
        stream.fill(tally)
        self._warn(tally.record)
        return {}

    def _asynchronous(self, version: int, name: str) -> RecordDict:
        """What a device is sent: the same content for all of one model, but for what clients with a state are told."""
        key = name if self.stateful else ""
        if key not in self._contents:
            extra = {**self.aggregator.outgoing(self.shared), **self._counted([name], self.stateful)}
            self._contents = {key: self._request(version, extra).to_record()}
        return self._contents[key]

    def _train(self, tally: Tally) -> dict[str, str]:
        """Count the round's replies; returns the instructions that were not answered in time, by device."""
        if isinstance(self.grid, CohortGrid) and not self.settings.over_select:
            self._train_cohort(self.grid, tally)
            return {}
        record, plan = tally.record, self._plan(MessageType.TRAIN, tally.record.round)
        found = self.grid.recall(plan.group)
        nodes: Mapping[str, int] = found.nodes if found is not None else {}
        if found is None or found.facts.get("fingerprint") != plan.fingerprint:
            nodes = self._chosen(record)
            if not nodes:
                return {}
        talk = Talk(
            self.grid,
            dataclasses.replace(plan, wanted=self._wanted(len(nodes))),
            tally.look,
            stop=self.stop,
            partial=tally.partial,
            facts=tally.facts,
            closing=lambda: tally.decide_stale(self.grid),
        )
        if talk.exchange is not None:
            tally.take_up(talk)
        outcome = talk.run(lambda: self._training(record, nodes).to_record(), nodes)
        record.refused, record.late = outcome.refused, sorted(outcome.late)
        self._warn(record)
        tally.count_stale(self.grid)
        return outcome.late

    def _train_cohort(self, grid: CohortGrid, tally: Tally) -> None:
        """Clients near by are never late, and their partial sums come back in place of their replies."""
        record = tally.record
        choice = self.selector.choose(grid.client_names(), self.settings.clients_per_round, round=record.round)
        record.skipped = dict(choice.skipped)
        if len(choice.chosen) < max(1, self.settings.min_clients):
            record.failed = f"{len(choice.chosen)} devices may take part, {self.settings.min_clients} are needed"
            return
        request = self._training(record, choice.chosen)
        tally.take(grid.train_cohort(request, choice.chosen, self.stop))
        self._warn(record)

    def _chosen(self, record: RoundRecord) -> dict[str, int]:
        """Whom the selector asks, of the devices that are online; none when too few are there in time."""
        deadline = self.grid.now() + self.settings.deadline_s
        while True:
            left = max(0.0, deadline - self.grid.now())
            try:
                self.grid.wait_devices(self.settings.min_clients, left, self.stop)
            except RefusedError as error:
                record.failed = error.message
                return {}
            nodes = {name: node for node, name in self.grid.device_names().items()}
            count = math.ceil(self.settings.clients_per_round * (1 + self.settings.over_select))
            choice = self.selector.choose(tuple(nodes), count, round=record.round)
            record.skipped = dict(choice.skipped)
            if len(choice.chosen) >= self.settings.min_clients:
                return {name: nodes[name] for name in choice.chosen}
            if not self.grid.wait_change(left, self.stop):
                record.failed = f"{len(choice.chosen)} devices may take part, {self.settings.min_clients} are needed"
                return {}

    def _wanted(self, asked: int) -> int:
        """How many usable replies end the waiting; 0 = the replies of all."""
        if not self.settings.over_select:
            return 0
        wanted = self.settings.clients_per_round or math.ceil(asked / (1 + self.settings.over_select))
        return wanted if wanted < asked else 0

    def _plan(self, kind: str, number: int) -> Plan:
        said = json.dumps(
            [to_table(self.config, chosen=True), self.seed, self.num_rounds, array_format.fingerprint(self.arrays)],
            sort_keys=True,
        )
        return Plan(
            group=f"{kind}-{number}",
            kind=kind,
            round=number,
            fingerprint=atomic.sha256_bytes(said.encode()),
            deadline_s=self.settings.deadline_s,
            keep_late=kind == MessageType.TRAIN and self.settings.late == "next",
        )

    def _training(self, record: RoundRecord, nodes: Iterable[str]) -> Request:
        extra = {**self.aggregator.outgoing(self.shared), **self._counted(nodes, self.stateful)}
        record.bytes_down = sum(a.nbytes for part in (self.arrays, extra) for a in part.values())
        return self._request(record.round, extra)

    def _counted(self, nodes: Iterable[str], told: bool) -> Arrays:
        """For clients that keep a state: which of their updates was counted last."""
        return counted_arrays({name: self.counted.get(name, 0) for name in nodes}) if told else {}

    def _note_counted(self, record: RoundRecord) -> None:
        if self.stateful and record.applied:
            counted = {name: record.round - record.staleness.get(name, 0) for name in record.clients}
            self.counted.update({**counted, **record.late_counted})

    def _request(self, number: int, extra: Arrays) -> Request:
        return Request(
            application=self.application.name,
            config={key: section for key, section in self.table.items() if key != "selection"},  # the server's own
            round=number,
            num_rounds=self.num_rounds,
            seed=self.seed,
            arrays=self.arrays,
            extra=extra,
            defaults=tuple(at_default(self.config)),
        )

    def _apply(self, tally: Tally) -> None:
        record, usable = tally.record, len(tally.record.clients) + len(tally.record.late_counted)
        if usable >= max(1, self.settings.min_clients):
            self.arrays = {**self.arrays, **self.aggregator.finish(tally.state)}
            record.applied, record.failed = True, ""
            self._note_counted(record)
            self.seen.update(record.clients, record.late_counted)
        else:
            record.failed = record.failed or f"{usable} usable replies, {self.settings.min_clients} are needed"
            facts = {"round": record.round, "usable": usable, "min_clients": self.settings.min_clients}
            log.warning("round changes nothing: %s", record.failed, extra={"facts": facts})
        record.loss = weighted_mean(record.clients, record.num_examples).get("loss")
        self.average.add(record.round, self.arrays)

    def _warn(self, record: RoundRecord) -> None:
        for name, reason in record.refused.items():
            facts = {"device": name, "round": record.round, "reason": reason}
            log.warning("reply refused", extra={"facts": facts})

    def _evaluate(self, record: RoundRecord) -> None:
        if isinstance(self.grid, CohortGrid) and not self.settings.over_select:
            told = self._counted(record.clients, bool(self.personal))
            request = self._request(record.round, told)
            found = self.grid.evaluate_cohort(request, sorted(record.clients), self.stop)
            record.client_evaluation.update(found.clients)
            self._evaluated(record, found.num_examples)
            return
        counts: dict[str, int] = {}

        def look(name: str, message: Message) -> int:
            reply = read_reply(message, name)
            if reply.num_examples:
                record.client_evaluation[name], counts[name] = dict(reply.metrics), reply.num_examples
            return 0

        plan = self._plan(MessageType.EVALUATE, record.round)
        talk = Talk(self.grid, plan, look, stop=self.stop)
        nodes = {name: node for node, name in self.grid.device_names().items() if name in record.clients}
        if talk.exchange is not None or nodes:  # devices that did not answer cost a deadline already
            told = self._counted(nodes, bool(self.personal))
            talk.run(lambda: self._request(record.round, told).to_record(), nodes)
        self._evaluated(record, counts)

    def _evaluated(self, record: RoundRecord, counts: dict[str, int]) -> None:
        record.client_evaluation = {k: record.client_evaluation[k] for k in sorted(record.client_evaluation)}
        record.evaluation = weighted_mean(record.client_evaluation, counts)
        if self.evaluate_global:
            record.held_out = self.evaluate_global(self.arrays)

    def _manifest(self, step: int, metrics: dict[str, float]) -> CheckpointManifest:
        parent, lineage = checkpoints.child_lineage(self.start)
        return CheckpointManifest(
            application=self.application.name,
            config=self.table,
            stage=self.stage,
            parent_sha256=parent,
            lineage=lineage,
            step=step,
            seed=self.seed,
            clients_seen=sorted(self.seen),
            metrics=metrics,
        )

    def _save(self, number: int, record: RoundRecord) -> None:
        data = array_format.to_bytes(self.arrays)
        encoded = Encoded(data, atomic.sha256_bytes(data))
        record.model_sha256 = encoded.sha256
        due = number == self.num_rounds or time.monotonic() - self._saved_at >= self.save_seconds
        # The history first: a crash before the checkpoint repeats the round, and its line is superseded.
        self.history.append(record, durable=due)
        self.selector.note(record)
        if due:
            self._write(number, record.held_out or record.evaluation, encoded)

    def _write(self, number: int, metrics: dict[str, float], encoded: Encoded) -> None:
        state = {
            STATE_NAME: array_format.to_bytes({**self.aggregator.save(), **self.average.save()}),
            STALE_NAME: json.dumps(self.stale).encode(),
        }
        folder = self.out / f"round-{number:05d}"
        Checkpoint(self._manifest(number, metrics), self.arrays, state).save(folder, encoded)
        atomic.point_to(self.out / checkpoints.LATEST, folder.name)
        self.done, self._saved_at = number, time.monotonic()
        for old in sorted(self.out.glob("round-*"))[:-KEEP_ROUNDS]:
            shutil.rmtree(old)

    def _finish(self) -> Path:
        final = self.average.result(self.arrays)
        metrics = self.history.records[-1].evaluation if self.history.records else {}
        if self.evaluate_global:
            metrics = self.evaluate_global(final)
        Checkpoint(self._manifest(self.done, metrics), final).save(self.out / "final")
        atomic.point_to(self.out / checkpoints.LATEST, "final")
        return self.out / "final"

    def _resume(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        rounds = sorted(p for p in self.out.glob("round-*") if p.is_dir())
        if not rounds:
            return
        found = checkpoints.load(rounds[-1], with_state=True)
        parent = self.start.manifest.model_sha256 if self.start else ""
        mine = dataclasses.replace(found.manifest, parent_sha256=parent, seed=self.seed)
        same = mine == found.manifest and describes(found.manifest.config, self.config)
        if not same or found.manifest.application != self.application.name:
            raise IntegrityError(
                f"{self.out}: holds a run with another configuration, seed or starting model",
                remedy="name a new --out folder, or repeat the command that began this run",
            )
        table = array_format.from_bytes(found.state[STATE_NAME], origin=str(rounds[-1]))
        self.aggregator.load(table, found.arrays)
        self.average.load(table)
        self.arrays, self.done = found.arrays, found.manifest.step
        self.seen = set(found.manifest.clients_seen)
        late = json.loads(found.state.get(STALE_NAME, b"{}"))
        self.stale = {name: (str(i), int(number)) for name, (i, number) in late.items()}
        atomic.point_to(self.out / checkpoints.LATEST, rounds[-1].name)
        self.grid.end_rounds(self.done, [i for i, _ in self.stale.values()])
