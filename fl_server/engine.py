"""The round engine: drives an Aggregator over a StreamGrid, in deployment and in simulation alike.

Replies are counted in the order of device names, whatever the order of arrival, and one at a time, so that a
simulated and a deployed federation end in the same weights and memory does not grow with the number of clients.
A bad reply is refused with its reason; a missing one costs the round at most ``algorithm.deadline_s``.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import MessageType

from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import State, Update
from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.flower.grid import StreamGrid
from fl_core.flower.messages import Reply, Request
from fl_core.learning.application import Application
from fl_core.learning.averaging import ModelAverage
from fl_core.storage import atomic
from fl_server.history import History, RoundRecord, weighted_mean
from fl_server.screening import read_reply, screen_update
from fl_server.selection import Selector, UniformSelector

log = logging.getLogger(__name__)
KEEP_ROUNDS = 3
STATE_NAME = "aggregator.safetensors"


class RoundEngine:
    """``run()`` goes from ``start`` to the checkpoint ``out/final``; an interrupted ``out`` is taken up where it stood.

    on_round: called with each finished RoundRecord. selector: who is asked (default: uniformly). evaluate_global(arrays) -> metrics: the server's own evaluation.
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
    ) -> None:
        self.grid, self.application, self.config = grid, application, config
        self.start, self.num_rounds, self.seed, self.out, self.stage = start, num_rounds, seed, out, stage
        self.on_round, self.evaluate_global = on_round, evaluate_global
        self.settings = config.algorithm
        self.selector = selector or UniformSelector(seed)
        self.aggregator = build_algorithm(config.algorithm).aggregator
        self.average = ModelAverage(self.settings.average_last, num_rounds)
        self.arrays: Arrays = initial
        self.done = 0
        self.seen: set[str] = set(start.manifest.clients_seen) if start else set()
        self.table = to_table(config)
        self._resume()
        self.history = History(out, resumed_round=self.done)

    def run(self) -> Path:
        """All remaining rounds; returns the folder of the final checkpoint."""
        try:
            for number in range(self.done + 1, self.num_rounds + 1):
                self._round(number)
            return self._finish()
        finally:
            self.history.close()

    def _round(self, number: int) -> None:
        began, record = time.monotonic(), RoundRecord(round=number)
        nodes = {name: node for node, name in self.grid.device_names().items()}
        if len(nodes) < self.settings.min_clients:
            self.grid.wait_devices(self.settings.min_clients, self.settings.deadline_s)
            nodes = {name: node for node, name in self.grid.device_names().items()}
        choice = self.selector.choose(tuple(nodes), self.settings.clients_per_round, round=number)
        chosen, record.skipped = choice.chosen, dict(choice.skipped)
        state = self.aggregator.begin(number, self.arrays)
        request = self._request(number)

        def count(name: str, reply: Reply) -> None:
            screen_update(reply, self.arrays, name, max_norm=self.settings.max_update_norm)
            self.aggregator.add(state, Update(arrays=reply.arrays, weight=float(reply.num_examples), extra=reply.extra))
            record.clients[name], record.num_examples[name] = dict(reply.metrics), reply.num_examples

        self._exchange(request, MessageType.TRAIN, {n: nodes[n] for n in chosen}, record, count)
        self._apply(state, record)
        every = self.settings.evaluate_every
        if every and (number % every == 0 or number == self.num_rounds):
            self._evaluate(number, {n: nodes[n] for n in chosen}, record)
        record.seconds = time.monotonic() - began
        self._save(number, record)
        if self.on_round:
            self.on_round(record)

    def _request(self, number: int) -> Request:
        return Request(
            application=self.application.name,
            config=self.table,
            round=number,
            num_rounds=self.num_rounds,
            seed=self.seed,
            arrays=self.arrays,
        )

    def _exchange(
        self,
        request: Request,
        kind: str,
        nodes: Mapping[str, int],
        record: RoundRecord,
        count: Callable[[str, Reply], None],
    ) -> None:
        """Send to all, then count the replies in the order of names: the sorted prefix as it completes."""
        group = f"{kind}-{request.round}"
        content, order = request.to_record(), sorted(nodes)
        messages = [
            self.grid.create_message(content, kind, nodes[n], group, ttl=self.settings.deadline_s + 60) for n in order
        ]
        ids = dict(zip(order, self.grid.push_messages(messages), strict=True))
        deadline = time.monotonic() + self.settings.deadline_s
        waiting, position = {i for i in ids.values() if i}, 0
        while position < len(order):
            if ids[order[position]] in waiting:
                left = max(0.0, deadline - time.monotonic())  # 0: what arrived while others were counted is not late
                arrived = self.grid.wait_ready(waiting, left)
                waiting -= arrived
                if not arrived:
                    break
                continue
            self._count_one(order[position], ids[order[position]], record, count)
            position += 1
        for name in order[position:]:  # after the deadline: what did arrive still counts, in order
            if ids[name] in waiting:
                record.late.append(name)
            else:
                self._count_one(name, ids[name], record, count)
        self.grid.forget([i for i in ids.values() if i])

    def _count_one(self, name: str, message_id: str, record: RoundRecord, count: Callable[[str, Reply], None]) -> None:
        try:
            found = list(self.grid.pull_messages([message_id])) if message_id else []
            if not found:
                raise IntegrityError(f"{name}: no readable reply")
            count(name, read_reply(found[0], name))
        except IntegrityError as error:
            record.refused[name] = error.message
            log.warning(
                "reply refused", extra={"facts": {"device": name, "round": record.round, "reason": error.message}}
            )

    def _apply(self, state: State, record: RoundRecord) -> None:
        if len(record.clients) >= max(1, self.settings.min_clients):
            self.arrays = self.aggregator.finish(state)
            record.applied = True
            self.seen.update(record.clients)
        else:
            log.warning(
                "round changes nothing: too few usable replies",
                extra={
                    "facts": {
                        "round": record.round,
                        "usable": len(record.clients),
                        "min_clients": self.settings.min_clients,
                    }
                },
            )
        record.loss = weighted_mean(record.clients, record.num_examples).get("loss")
        self.average.add(record.round, self.arrays)

    def _evaluate(self, number: int, nodes: Mapping[str, int], record: RoundRecord) -> None:
        counts: dict[str, int] = {}

        def count(name: str, reply: Reply) -> None:
            if reply.num_examples:
                record.client_evaluation[name], counts[name] = dict(reply.metrics), reply.num_examples

        evaluated = RoundRecord(round=number)
        answering = {n: node for n, node in nodes.items() if n in record.clients}  # the others cost a deadline already
        if answering:
            self._exchange(self._request(number), MessageType.EVALUATE, answering, evaluated, count)
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
        state = array_format.to_bytes({**self.aggregator.save(), **self.average.save()})
        metrics = record.held_out or record.evaluation
        folder = self.out / f"round-{number:05d}"
        # The history first: a crash before the checkpoint repeats the round, and its line is superseded.
        record.model_sha256 = atomic.sha256_bytes(array_format.to_bytes(self.arrays))
        self.history.append(record)
        Checkpoint(self._manifest(number, metrics), self.arrays, {STATE_NAME: state}).save(folder)
        atomic.point_to(self.out / checkpoints.LATEST, folder.name)
        self.done = number
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
        mine = dataclasses.replace(found.manifest, config=self.table, parent_sha256=parent, seed=self.seed)
        if mine != found.manifest or found.manifest.application != self.application.name:
            raise IntegrityError(
                f"{self.out}: holds a run with another configuration, seed or starting model",
                remedy="name a new --out folder, or repeat the command that began this run",
            )
        table = array_format.from_bytes(found.state[STATE_NAME], origin=str(rounds[-1]))
        self.aggregator.load(table, found.arrays)
        self.average.load(table)
        self.arrays, self.done = found.arrays, found.manifest.step
        self.seen = set(found.manifest.clients_seen)
