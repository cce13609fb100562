"""The agent: a thin loop between MQTT, the federation's link, the updater and the inference engine.

This process stays small: it imports neither torch, flwr, tuf nor rich, and grpc only where serving is switched on;
updates and training run in processes of their own. Decisions are in ``duties``, model work in ``models``, MQTT in
``field_link``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_clients.connection import Welcome, open_transport
from fl_clients.edge import duties
from fl_clients.edge.contact import ContactKeeper
from fl_clients.edge.duties import JobDesk, Schedule, reply_body
from fl_clients.edge.field_link import FieldLink
from fl_clients.edge.models import Models, NothingPublished
from fl_clients.edge.settings import AgentHome, AgentSettings
from fl_clients.edge.welcome import enter, enter_or_remember, stored_welcome
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError
from fl_core.identity.keys import load_private_key
from fl_core.link import topics
from fl_core.link.backoff import Backoff
from fl_core.link.envelope import Envelope

LOG = logging.getLogger(__name__)
TICK_S = 5.0
JOIN_S = 5.0
CONNECT_S = 10.0
FIRST_RETRY_S = 30.0
TELEMETRY = "telemetry"
TRAINING_PACKAGES = ("torch", "flwr")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line lays over agent.toml."""

    data: Path
    train: bool
    infer: bool
    serve_port: int | None = None
    once: bool = False


class Agent:
    """run() until SIGTERM or SIGINT, or one update and one inference with ``options.once``; then close().

    Only what is wrong on this device ends it: a server that is away or refuses is asked again, and meanwhile the
    installed model runs. With ``once``, run() raises RefusedError (Unregistered: with the remedy) instead.
    """

    def __init__(self, home: AgentHome, settings: AgentSettings, options: RunOptions) -> None:
        self.home, self.settings, self.options = home, settings, options
        self.key = load_private_key(home.key_file)
        self.connection = open_transport(home, settings, self.key)
        self.stop, self.wake = threading.Event(), threading.Event()
        self.started = time.monotonic()
        self.training = "off"
        self.grpc_port: int | None = None
        self.last_inference: dict[str, Any] | None = None
        self.inferred_version: int | None = None
        self.errors: dict[str, FieldfleetError] = {}
        self._tasks: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.models = Models(home, settings, self.key, options.data)
        # A ring may have been missed while the connection was down: the fleet link then asks for itself.
        self.link = FieldLink(home, settings.mqtt, self.facts, self.wake.set)
        self.desk = JobDesk(self.link.finished)
        self.keeper = ContactKeeper(
            lambda: enter(home, self.connection),
            welcomed=self._welcomed,
            changed=self.link.announce,
            complete=lambda: self.link.session is None or self.link.connected,
        )
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
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: self.request_stop())
        with contextlib.suppress(FieldfleetError):  # an unusable model is the updater's to replace
            self.models.engine.reload()
        if self.options.serve_port is not None:
            self.grpc_port = self.models.serve(self.settings.grpc.host, self.options.serve_port)
            LOG.info("agent: gRPC on %s:%d", self.settings.grpc.host, self.grpc_port)
        if self.options.once:
            self._once()
        else:
            self._thread("agent-tasks", self._work)
            if (known := stored_welcome(self.home)) is not None:  # a device starts without its network, too
                self._welcomed(known)
            self._thread("agent-contact", lambda: self.keeper.run(self.stop))
            self._loop()
        self._end()
        wanted = duties.INFER if self.options.infer else duties.UPDATE
        if self.options.once and wanted in self.errors:
            raise self.errors[wanted]

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
            self._perform(kind)

    def _welcomed(self, found: Welcome) -> None:
        """Who we are, from the last run or from the server."""
        self.link.enter(found)
        if not self._begun:
            self._begun = True
            self._tasks.put((duties.UPDATE, ""))
            if self.options.train:
                self._start_training()
        elif duties.UPDATE in self.errors:  # it may have failed because the server was away
            self._tasks.put((duties.UPDATE, ""))

    def _duties(self) -> Schedule:
        intervals = self.settings.intervals
        return Schedule(
            {
                duties.UPDATE: intervals.update_s,
                duties.INFER: intervals.infer_s if self.options.infer else 0.0,
                TELEMETRY: intervals.telemetry_s if self.settings.mqtt.enabled else 0.0,
            }
        )

    def _loop(self) -> None:
        schedule = self._schedule
        schedule.start(time.monotonic())
        while not self.stop.is_set():
            wait = schedule.seconds_left(time.monotonic(), at_most=TICK_S)
            if self.link.session is None:
                self.stop.wait(wait)
            elif (message := self.link.receive(wait)) is not None:
                self._guarded(self._take, *message)
            for duty in schedule.take_due(time.monotonic()):
                if duty == TELEMETRY:
                    self._guarded(self._tell_telemetry)
                else:
                    self._tasks.put((duty, ""))

    def _tell_telemetry(self) -> None:
        self.link.report(TELEMETRY, self.facts(), droppable=True)

    @staticmethod
    def _guarded(step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception:  # a full disk under the outbox, say
            LOG.exception("agent: a message was not dealt with")

    def _end(self) -> None:
        self.stop.set()
        self.keeper.ring()
        self.connection.interrupt()
        self._tasks.put(None)
        for thread in self._threads:
            thread.join(JOIN_S)
        self.models.close()
        self.link.stop()

    def _thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # commands

    def _take(self, kind: str, message: Envelope) -> None:
        if kind == topics.DESIRED:
            self._tasks.put((duties.UPDATE, ""))
            return
        step = self.desk.decide(message)
        if step == "ring":
            self.wake.set()
        elif step == "repeat":
            self.link.repeat(message.id)
        elif step == "refuse":
            self._finish(message, reply_body(ok=False, error=f"unknown command {message.type!r}"))
        elif step == "run" and message.type == duties.PING:
            self._finish(message, reply_body(ok=True, time=time.time(), boot=self.link.boot))
        elif step == "run" and message.type == duties.REPORT:
            self._finish(message, reply_body(ok=True, **self.facts()))
        elif step == "run":
            self._tasks.put((message.type, message.id))

    def _finish(self, command: Envelope, body: dict[str, Any]) -> None:
        self.link.finish(command.id, command.type, body)
        self.desk.done(command.id)

    # work

    def _work(self) -> None:
        """Updates and inference, one after the other, beside the loop that answers commands."""
        while (task := self._tasks.get()) is not None and not self.stop.is_set():
            try:
                self._do(*task)
            except Exception:  # a full disk under the outbox, say: the job stays open, and the server repeats it
                LOG.exception("agent: %s", task[0])
                self.desk.done(task[1])

    def _do(self, kind: str, job_id: str) -> None:
        body = self._perform(kind)
        if kind == duties.UPDATE:
            self._plan_retry()
        if job_id and not self.stop.is_set():  # else it stays open, and is run when it is sent again
            self.link.finish(job_id, kind, body)
            self.desk.done(job_id)
        # a model that has not been run here yet, whether the update brought it now or before a restart
        if kind == duties.UPDATE and self.options.infer and self._version() not in (None, self.inferred_version):
            self.inferred_version = self._version()
            self._tasks.put((duties.INFER, ""))

    def _plan_retry(self) -> None:
        """An update that failed is not put off until the next regular check."""
        error = self.errors.get(duties.UPDATE)
        if error is None or isinstance(error, NothingPublished):
            self._update_backoff.reset()
        else:
            self._schedule.hasten(duties.UPDATE, time.monotonic() + self._update_backoff.next())

    def _version(self) -> int | None:
        model = self.models.current()
        return None if model is None else int(model["version"])

    def _perform(self, kind: str) -> dict[str, Any]:
        """The reply's body. Errors are reported, kept in ``errors``, and end with the next success."""
        try:
            body = reply_body(ok=True, **(self._update() if kind == duties.UPDATE else self._infer()))
            self.errors.pop(kind, None)
            return body
        except FieldfleetError as error:
            LOG.log(
                logging.INFO if isinstance(error, NothingPublished) else logging.ERROR, "agent: %s: %s", kind, error
            )
            self.errors[kind] = error
        except Exception as error:
            LOG.exception("agent: %s", kind)
            self.errors[kind] = EnvironmentFault(f"{kind}: unexpected failure: {type(error).__name__}: {error}")
        return reply_body(ok=False, error=self.errors[kind].message[:500])

    def _update(self) -> dict[str, Any]:
        changed = self.models.update()
        if changed:
            self.link.announce()
        return {"changed": changed, "model": self.models.current()}

    def _infer(self) -> dict[str, Any]:
        self.last_inference = self.models.infer()
        self.inferred_version = self._version()
        self.link.report("inference", self.last_inference)
        self.link.announce()
        return self.last_inference

    # training

    def _start_training(self) -> None:
        missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            LOG.info("agent: no training here, %s is not installed", missing[0])
            return
        self._thread("agent-fleet", self._train)

    def _train(self) -> None:
        # By name: the torch-free half never imports the training half.
        module = importlib.import_module("fl_clients.training.link")
        try:
            link = module.FleetLink(
                open_transport(self.home, self.settings, self.key),
                self.home.fleet,
                worker_command(self.name, self.options.data, self.settings.device.application),
                self.wake,
                self._on_fleet_event,
                wake_ready=lambda: self.link.connected,
            )
        except FieldfleetError as error:
            LOG.error("agent: no training: %s", error)
            return
        link.run(self.stop)

    def _on_fleet_event(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "joined":
            self.keeper.ring_if_not_ok()
        elif event in ("away", "refused"):
            self.keeper.note("away" if event == "away" else "refused", str(facts.get("reason", "")))
        if event in ("joined", "away", "refused") and event != self.training:
            self.training = event
            self.link.announce()

    # facts

    def facts(self) -> dict[str, Any]:
        """What the server may know of this device: never data, scores or paths."""
        waiting, dropped = self.link.store.depth()
        return {
            "application": self.settings.device.application,
            "roles": {"train": self.training, "infer": self.options.infer, "serve": self.grpc_port},
            "model": self.models.current(),
            "inference": self.last_inference,
            "contact": self.keeper.contact.facts(),
            "failures": {kind: error.message[:500] for kind, error in self.errors.items()},
            "outbox": {"waiting": waiting, "dropped": dropped},
            "uptime_s": round(time.monotonic() - self.started, 1),
            "rss_mb": resident_mb(),
            "python": sys.version.split()[0],
        }


def worker_command(name: str, data: Path, application: str) -> list[str]:
    """The training worker's command line: a process of its own, started by the fleet link when there is work."""
    command = [sys.executable, "-m", "fl_clients.training.worker", "--name", name, "--data", str(data)]
    return [*command, "--application", application] if application else command


def resident_mb() -> float | None:
    """Memory of this process that is in RAM, in MiB (VmRSS); None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return round(int(line.split()[1]) / 1024, 1)
    except (OSError, ValueError):
        pass
    return None
