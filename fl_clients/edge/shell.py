"""The agent: a thin loop between MQTT, the server, the applications' models and the federation.

This process stays small: it imports neither numpy, onnxruntime, torch, flwr, tuf, grpc nor rich; updates, inference and
training run in processes of their own. Decisions are in ``duties``, jobs in ``work``, the server in ``contact``, MQTT in
``field_link``, federations in ``training``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_clients.connection import Welcome, open_transport, open_tunnel
from fl_clients.edge import duties
from fl_clients.edge.capabilities import capabilities
from fl_clients.edge.condition import Condition
from fl_clients.edge.contact import ContactKeeper
from fl_clients.edge.courier import Courier
from fl_clients.edge.data_state import DataStates
from fl_clients.edge.device_state import Probes
from fl_clients.edge.duties import Schedule
from fl_clients.edge.field_link import FieldLink
from fl_clients.edge.home import AgentHome
from fl_clients.edge.models import Models, NothingPublished
from fl_clients.edge.offers import Offer, Offers
from fl_clients.edge.operator import OperatorSocket, StatusFile
from fl_clients.edge.orders import Orders
from fl_clients.edge.samples.keeper import SampleKeeper
from fl_clients.edge.settings import AgentSettings
from fl_clients.edge.training import Training, worker_command
from fl_clients.edge.updater import UpdateResult
from fl_clients.edge.welcome import enter, enter_or_remember, stored_welcome
from fl_clients.edge.work import Task, Work
from fl_core.contracts.errors import InputError, IntegrityError, RefusedError
from fl_core.identity.keys import load_private_key
from fl_core.link import topics
from fl_core.link.backoff import Backoff
from fl_core.link.envelope import Envelope
from fl_core.runtime.machine import release_library_pages, resident_bytes, return_memory_early, return_memory_now

LOG = logging.getLogger(__name__)
TICK_S = 5.0
JOIN_S = 5.0
CONNECT_S = 10.0
FIRST_RETRY_S = 30.0
TOLD_UPDATE_S = 6 * 3_600.0
STATE_PATH, STATE_KEYS = "/fieldfleet/v1/state", ("device", "capabilities")
TELEMETRY, SETTLE, CONDITION = "telemetry", "settle", "condition"
CONDITION_S = 5.0  # between looks at the device's own condition
ANNOUNCED = ("joined", "away", "refused", "worker_failed", "waiting", "paused", "resumed")
REUSED_BYTES = 2 << 20  # while a model comes or goes; the fleet link gives it back
FIRST_SETTLE_S, SETTLE_S = 8.0, 120.0  # give back what only the start, or a burst of work, needed


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line lays over agent.toml. data: application -> folder, see AgentHome.data_folders."""

    data: Mapping[str, Path]
    train: bool
    infer: bool
    serve_port: int | None = None
    once: bool = False


class Agent:
    """run() until SIGTERM or SIGINT, or one update and one inference with ``options.once``; then close().

    Only what is wrong on this device ends it: a server that is away or refuses is asked again, and meanwhile the
    installed models run. With ``once``, run() raises RefusedError (Unregistered: with the remedy) instead.
    """

    def __init__(self, home: AgentHome, settings: AgentSettings, options: RunOptions) -> None:
        self.home, self.settings, self.options = home, settings, options
        self.key = load_private_key(home.key_file)
        self.tunnel = open_tunnel(home, settings, self.key)
        self.connection = open_transport(home, settings, self.key, self.tunnel)
        self.stop, self.wake = threading.Event(), threading.Event()
        self.started = time.monotonic()
        self.grpc_port: int | None = None
        self._threads: list[threading.Thread] = []
        self.models = Models(home, settings, self.key, options.data, self.tunnel)
        self.work = Work(self.models, self, infer_new=options.infer and not options.once, stopping=self.stop.is_set)
        self.training = Training(self._on_fleet_event)
        self.capabilities = capabilities(
            settings, train=options.train, infer=options.infer, serve=options.serve_port is not None
        )
        data = next(iter(options.data.values()), home.folder)
        states = DataStates(options.data, home.folder / "data-state.json", lambda: self.samples.summaries())
        self.condition = Condition(
            settings.policy,
            Probes(settings.state, home.folder, data).read,
            home.folder,
            skew=lambda: self.connection.signer.clock_facts()["skew_s"],
            data=states,
            counted=states.counted,
        )
        # A ring may have been missed while the connection was down: the fleet link then asks for itself.
        self.link = FieldLink(
            home,
            settings.mqtt,
            self.facts,
            self._link_changed,
            settings.outbox,
            self.key,
            answered=lambda store, upto: self.courier.answered(store, upto),
            tunnel=self.tunnel,
        )
        self.courier = Courier(
            self.link.records, self.link, lambda: open_transport(home, settings, self.key, self.tunnel)
        )
        self.samples = SampleKeeper(home, settings, changed=self._new_samples)
        self.orders = Orders(
            self.link,
            self.models,
            self.work,
            ring=self.wake.set,
            facts=self.facts,
            enable=self._enable_training,
        )
        self.operator, self.status_file = OperatorSocket(home, self._serve_operator), StatusFile(home)
        self.keeper = ContactKeeper(
            lambda: enter(home, self.connection),
            welcomed=self._welcomed,
            changed=self._announce,
            complete=lambda: self.link.session is None or self.link.connected,
            tell=self._tell_state,
        )
        self.offers = Offers({name: settings.of(name).channel for name in settings.device.names})
        self._looked_at: float | None = None  # at the repository; None: a look is due
        self._begun = False
        self._schedule = self._duties()
        self._update_backoff = Backoff(FIRST_RETRY_S, settings.intervals.update_s)

    @property
    def name(self) -> str:
        """As registered; empty before the first welcome."""
        return self.link.name

    @property
    def fleet(self) -> str:
        return self.link.fleet

    # life

    def run(self) -> None:
        """With ``once`` it raises what kept it from its task."""
        return_memory_early(reused_bytes=REUSED_BYTES)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: self.request_stop())
        if self.options.serve_port is not None:
            self.grpc_port = self.models.serve(self.settings.grpc.host, self.options.serve_port)
            LOG.info("agent: gRPC on %s:%d", self.settings.grpc.host, self.grpc_port)
        known = stored_welcome(self.home)  # a device starts without its network, too
        if known is None:
            self.link.enter_by_account()
        try:
            if self.options.once:
                self._once()
            else:
                self.operator.start()
                self._thread("agent-work", self.work.run)
                if known is not None:
                    self._welcomed(known)
                self._thread("agent-contact", lambda: self.keeper.run(self.stop))
                self._thread("agent-records", lambda: self.courier.run(self.stop))
                if self.settings.samples.enabled:
                    self._thread("agent-samples", lambda: self.samples.run(self.stop))
                self._loop()
        finally:
            self._end()
        wanted = duties.INFER if self.options.infer else duties.UPDATE
        if self.options.once and (error := self.work.error_of(wanted)) is not None:
            raise error

    def request_stop(self) -> None:
        """Safe in a signal handler and from any thread."""
        self.stop.set()
        self.link.ring()
        self.keeper.ring()

    def close(self) -> None:
        self.link.close()
        self.connection.close()

    def _once(self) -> None:
        self.link.enter(enter_or_remember(self.home, self.connection))
        if self.link.session is not None:
            self.link.session.wait_connected(CONNECT_S)
        for kind in (duties.UPDATE, *([duties.INFER] if self.options.infer else [])):
            self.work.perform(kind)
        self.courier.flush(CONNECT_S)

    def _welcomed(self, found: Welcome) -> None:
        """Who we are, from the last run or from the server."""
        self.link.enter(found)
        if not self._begun:
            self._begun = True
            self.work.put(Task(duties.UPDATE))
            if self.options.train and self.training.possible():
                self._thread("agent-fleet", self._train)
        elif self.work.error_of(duties.UPDATE) is not None:  # it may have failed because the server was away
            self.work.put(Task(duties.UPDATE))

    def _train(self) -> None:
        self.training.run(
            open_transport(self.home, self.settings, self.key, self.tunnel),
            self.home.fleet,
            worker_command(self.name, self.options.data, self.home.states),
            wake=self.wake,
            wake_ready=lambda: self.link.connected,
            stop=self.stop,
            permit=self.condition,
        )

    def _duties(self) -> Schedule:
        intervals = self.settings.intervals
        return Schedule(
            {
                duties.UPDATE: intervals.update_s,
                duties.INFER: intervals.infer_s if self.options.infer else 0.0,
                TELEMETRY: intervals.telemetry_s,
                SETTLE: SETTLE_S,
                CONDITION: CONDITION_S,
            }
        )

    def _loop(self) -> None:
        schedule = self._schedule
        schedule.start(time.monotonic())
        schedule.hasten(SETTLE, time.monotonic() + FIRST_SETTLE_S)
        while not self.stop.is_set():
            wait = schedule.seconds_left(time.monotonic(), at_most=TICK_S)
            if self.link.session is None:
                self.stop.wait(wait)
            elif (message := self.link.receive(wait)) is not None:
                self._guarded(self._take, *message)
            self._guarded(self.models.tick)
            for duty in schedule.take_due(time.monotonic()):
                if duty == TELEMETRY:
                    self._guarded(self._tell_telemetry)
                elif duty == CONDITION:
                    self._guarded(self._tell_condition)
                elif duty == SETTLE:
                    return_memory_now()
                    release_library_pages()
                elif duty != duties.UPDATE or self._should_look():
                    self.work.put(Task(duty))

    def _announce(self) -> None:
        """Something changed: the server hears it, and so does an operator after a crash."""
        self.link.announce()
        if self.link.session is None:
            self.keeper.tell_soon()
        self.status_file.write(self.local_facts)

    def _tell_state(self) -> None:
        """Without MQTT, by a request. An older server that does not listen to it need not know."""
        if self.link.session is not None:
            return
        facts = self.facts()
        body = json.dumps({key: facts[key] for key in STATE_KEYS if key in facts}).encode()
        answer = self.connection.request("POST", STATE_PATH, body, limit=65_536)
        if answer.status == 401:
            raise RefusedError(f"{self.connection.url} refuses this device: {answer.reason()}")
        if answer.status >= 400:
            LOG.info("agent: the server does not take our state: %s", answer.reason())

    def _tell_condition(self) -> None:
        if self.condition.news():
            self._announce()

    def _serve_operator(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("do") == duties.ENABLE:
            self._enable_training()
        return self.local_facts()

    def _enable_training(self) -> dict[str, Any]:
        self.training.enable()
        self._announce()
        return self.training.facts()

    def _should_look(self) -> bool:
        """While the server tells of new models, regular looks at its repository are few."""
        told = self.link.connected or self.training.state == "joined"
        return not told or self._looked_at is None or time.monotonic() - self._looked_at > TOLD_UPDATE_S

    def _tell_telemetry(self) -> None:
        facts = {key: value for key, value in self.facts().items() if key != "capabilities"}  # the state tells them
        self.link.report(TELEMETRY, facts, droppable=True)
        if self.link.session is None:
            self.keeper.tell_soon()

    @staticmethod
    def _guarded(step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception:  # a full disk under the outbox, say
            LOG.exception("agent: a step failed")

    def _new_samples(self, application: str) -> None:
        if self.options.infer and self.models.current(application) is not None:
            self.work.put(Task(duties.INFER, application=application))

    def _link_changed(self) -> None:
        self.wake.set()
        self.courier.ring()
        if not self.link.connected:
            self.keeper.doubt()

    def _end(self) -> None:
        self.stop.set()
        self.keeper.ring()
        self.courier.interrupt()
        self.connection.interrupt()
        self.work.end()
        for thread in self._threads:
            thread.join(JOIN_S)
        self.models.close()
        if self.tunnel is not None:
            self.tunnel.close()
        self.operator.stop()
        if not self.options.once:
            self.status_file.write(self.local_facts, now=True)
        self.condition.close()
        self.link.stop()

    def _thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # commands

    def _take(self, kind: str, message: Envelope) -> None:
        if kind != topics.DESIRED:
            self.orders.take(message)
        elif (offer := Offer.from_body(message.body)) is not None:
            self._hear(offer)

    def _hear(self, offer: Offer) -> None:
        """The repository has changed: look at it, but not together with every other device of the fleet."""
        models = self.models.currents()
        installed = {name: model["version"] if model is not None else None for name, model in models.items()}
        if self.offers.hear(offer, installed) and not self.work.is_open(duties.UPDATE):  # else see ``updated``
            self._looked_at = None
            self._schedule.hasten(duties.UPDATE, time.monotonic() + random.uniform(0.0, offer.spread_s))
            self.link.ring()

    # what the work tells

    def done(self, task: Task, body: dict[str, Any]) -> None:
        self._schedule.hasten(SETTLE, time.monotonic() + FIRST_SETTLE_S)
        if task.kind == duties.UPDATE:
            self._plan_retry()
        if task.job_id and not self.stop.is_set():  # else it stays open, and is run when it is sent again
            self.orders.finish(task.job_id, task.kind, body)

    def updated(self, application: str, result: UpdateResult) -> None:
        generation = result.facts.get("repository")
        if self.offers.looked(application, generation if type(generation) is int else None):
            self.work.put(Task(duties.UPDATE, application=application))
        if result.changed:
            self._announce()

    def inferred(self, report: dict[str, Any]) -> None:
        self.link.report("inference", report)
        self._announce()

    def _plan_retry(self) -> None:
        """An update that failed is not put off until the next regular check."""
        error = self.work.error_of(duties.UPDATE)
        hopeless = isinstance(error, InputError) and not isinstance(error, IntegrityError)  # our own settings
        if error is None or isinstance(error, NothingPublished) or hopeless:
            self._looked_at = time.monotonic()
            self._update_backoff.reset()
        else:
            self._looked_at = None
            self._schedule.hasten(duties.UPDATE, time.monotonic() + self._update_backoff.next())

    # what the fleet link tells

    def _on_fleet_event(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "joined":
            self.keeper.ring_if_not_ok()
        elif event in ("away", "refused"):
            self.keeper.note("away" if event == "away" else "refused", str(facts.get("reason", "")))
        elif event == "repository":
            self._hear(Offer(int(facts["generation"])))
        elif event == "worker_failed":
            self._guarded(self.link.report, "worker-failed", dict(facts))
        if event in ANNOUNCED:
            self._announce()

    # facts

    def facts(self) -> dict[str, Any]:
        """What the server may know of this device: never data, scores or paths."""
        (waiting, dropped), (records, lost) = self.link.store.depth(), self.link.records.depth()
        models = self.models.currents()
        return {
            "applications": list(models),
            "capabilities": self.capabilities,
            "device": self.condition.facts(),
            "roles": {"train": self.training.state, "infer": self.options.infer, "serve": self.grpc_port},
            "training": self.training.facts(),
            "model": next((facts for facts in models.values() if facts is not None), None),
            "models": models,
            "inference": self.work.last_inference,
            "contact": self.keeper.contact.facts(),
            "clock": self.connection.signer.clock_facts(),
            "failures": self.work.failures(),
            "samples": self.samples.summaries(),
            "outbox": {"waiting": waiting + records, "dropped": dropped + lost},
            "uptime_s": round(time.monotonic() - self.started, 1),
            "rss_mb": round(resident_bytes() / 2**20, 1),
            "inference_rss_mb": self.models.process.rss_mb,
            "python": sys.version.split()[0],
        }

    def local_facts(self) -> dict[str, Any]:
        """For the operator at the device: also what does not concern the server."""
        return {
            **self.facts(),
            "pid": os.getpid(),
            "transport": self.connection.url,
            "boot": self.link.boot,
            "broker": self.link.broker_facts(),
            "inference_process": {"pid": self.models.process.pid, "crashes": self.models.process.crashes},
        }
