"""FleetLink: the device's side of the federation. Waits for messages, has the worker answer them, hands the answers in.

It runs in the agent's process and needs neither flwr nor torch. Nothing that the server sends is code: a message
names an application that must be installed on the device.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_clients.connection import CertificateRefused, Transport, Unreachable, Unregistered, Welcome, welcome
from fl_clients.training.breaker import Breaker
from fl_clients.training.fleet import FleetClient, Gone, Instruction
from fl_clients.training.outbox import Outbox
from fl_clients.training.poll_interval import FIRST_POLL_S, PollInterval
from fl_clients.training.supervision import Always, Declined, Permit, Supervision
from fl_clients.training.worker_process import Stopped, WorkerFailed, WorkerLimits, WorkerProcess
from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.contracts.installed import package_version
from fl_core.flower import wire
from fl_core.link.backoff import Backoff
from fl_core.runtime.machine import return_memory_now

log = logging.getLogger(__name__)
OnEvent = Callable[[str, Mapping[str, Any]], None]
FIRST_BACKOFF, LAST_BACKOFF = 0.2, 30.0
FIRST_REFUSED_BACKOFF, LAST_REFUSED_BACKOFF = 2.0, 60.0
ROUTINE = ("message", "reply")
LARGE_BYTES = 1 << 20  # of a reply: what it was made of is given back


class FleetLink:
    """One device's link to its server.

    connection: the way to the server, for this link alone.
    home: a folder of its own (``outbox/``). worker_command: the command line of the worker process.
    wake: set by someone who knows of new messages sooner (MQTT); while ``wake_ready()`` the link waits for it and asks
      the server only every ``safety_seconds``; otherwise it holds a long poll, of ``poll_seconds`` at first.
    permit: the owner's policy (default: training is always allowed).
    on_event(name, facts): joined, away, refused, message, reply, worker_failed, dropped,
      repository (it has changed), waiting, paused, resumed, declined (by the policy).
    """

    def __init__(
        self,
        connection: Transport,
        home: Path,
        worker_command: Sequence[str],
        wake: threading.Event | None = None,
        on_event: OnEvent | None = None,
        *,
        wake_ready: Callable[[], bool] | None = None,
        poll_seconds: float = FIRST_POLL_S,
        safety_seconds: float = 1_500.0,
        idle_seconds: float = 300.0,
        permit: Permit | None = None,
    ) -> None:
        self.connection = connection
        self.client = FleetClient(self.connection)
        self.outbox = Outbox(home / "outbox")
        permit = permit or Always()
        limits = WorkerLimits(memory_mb=permit.policy.worker_memory_mb, nice=permit.policy.worker_nice)
        self.worker = WorkerProcess(worker_command, idle_seconds=idle_seconds, limits=limits)
        self._supervision = Supervision(self.worker, permit, self._heartbeat, self._tell)
        self.breaker = Breaker(home / "breaker.json", package_version("fieldfleet") or "")
        self.welcome: Welcome | None = None
        self._wake, self._wake_ready = wake, wake_ready or (lambda: wake is not None)
        self._poll, self._safety = PollInterval(poll_seconds), safety_seconds
        self._asked_at = -math.inf
        self._on_event = on_event or (lambda name, facts: None)
        self._repository: int | None = None
        self._stop = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set; whatever the server does, it is asked again."""
        self._stop = stop
        threading.Thread(target=self._interrupt_on_stop, name="fleet-link-stop", daemon=True).start()
        away, refused = Backoff(FIRST_BACKOFF, LAST_BACKOFF), Backoff(FIRST_REFUSED_BACKOFF, LAST_REFUSED_BACKOFF)
        joined = False
        try:
            while not stop.is_set():
                try:
                    if not joined:
                        self._join()
                    joined = True
                    self._step()
                    away.reset()
                    refused.reset()
                except RefusedError as error:  # only an operator can change that
                    self._tell("refused", reason=str(error).replace("\n  remedy: ", "; "))
                    if not joined:
                        stop.wait(refused.next())
                    joined = False
                except (Unreachable, Gone, IntegrityError, OSError) as error:
                    # whatever it was: join again, hand in what lies in the outbox, ask for what was lost
                    joined = False
                    if not stop.is_set() and not away.attempts:
                        self._tell("away", reason=str(error))
                    stop.wait(away.next())
                except Stopped:
                    break
                except Exception as error:  # the federation of this device must not end with one bad day
                    log.exception("fleet link")
                    joined = False
                    self._tell("away", reason=f"unexpected failure: {type(error).__name__}: {error}")
                    stop.wait(refused.next())
        finally:
            self.worker.kill()  # it holds nothing that is not in the outbox or asked for again
            self._leave()

    def _join(self) -> None:
        self.welcome = welcome(self.connection)
        self.client.activate(self.welcome.node_id)
        self._tell("joined", name=self.welcome.name, server=self.connection.url)
        self._flush()
        while not self._stop.is_set() and self._serve_next(0, every=self._poll.seconds, lost=True):
            pass
        self._asked_at = -math.inf  # so that the server soon hears how long we shall be quiet
        self._tell_of_repository()

    def _step(self) -> None:
        self.worker.end_if_idle()
        if self._wake is not None and self._wake_ready():
            self._wait_for_ring(self._wake)
        else:
            self._hold_poll()
        self._tell_of_repository()

    def _wait_for_ring(self, wake: threading.Event) -> None:
        """Rung, or ``safety_seconds`` after the last question: one that was not heard costs no more than that."""
        due = self._asked_at + self._safety
        if not wake.wait(max(0.0, min(due - time.monotonic(), self.worker.idle_left()))) and time.monotonic() < due:
            return
        wake.clear()
        while not self._stop.is_set() and self._serve_next(0, every=self._safety):
            pass
        self._asked_at = time.monotonic()

    def _hold_poll(self) -> None:
        began, seconds = time.monotonic(), min(self._poll.seconds, max(0.1, self.worker.idle_left()))
        try:
            served = self._serve_next(seconds, every=self._poll.seconds)
        except Unreachable:
            self._poll.broke(time.monotonic() - began)
            raise
        if not served and seconds == self._poll.seconds:
            self._poll.lasted(time.monotonic() - began)

    def _tell_of_repository(self) -> None:
        found = self.client.repository
        if found is not None and found != self._repository:
            self._repository = found
            self._tell("repository", generation=found)

    def _serve_next(self, seconds: float, *, every: float, lost: bool = False) -> bool:
        """Answer the next message, if one comes within ``seconds``; True when there was one."""
        try:
            instruction = self.client.receive(seconds, every=every, lost=lost)
        except Gone as error:  # taken back while it was being read: the round went on without us
            self._tell("dropped", reason=str(error))
            return True
        if instruction is None:
            return False
        self._tell("message", kind=instruction.kind, message_id=instruction.message_id)
        started = time.monotonic()
        reply = self._answer(instruction)
        message_id = instruction.message_id
        del instruction  # a model: not needed while another one is sent
        self.outbox.put(reply)
        self._flush(reply)
        if sum(map(len, reply.objects.values())) > LARGE_BYTES:
            del reply
            return_memory_now()
        self._tell("reply", message_id=message_id, seconds=round(time.monotonic() - started, 3))
        return True

    def _answer(self, instruction: Instruction) -> wire.WireReply:
        run, circuit = instruction.run_id, self.breaker.circuit
        if circuit.open_for(run):
            return wire.error_reply(instruction.envelope, f"training is disabled on this device: {circuit.disabled}")
        if self.worker.pid is None and self._stop.wait(circuit.pause(run)):
            raise Stopped
        try:
            reply = self._supervision.run(instruction, self._stop)
            self.breaker.succeeded()
            reply.check_limits()
            return reply
        except Declined as error:
            self._tell("declined", reason=str(error))
            return wire.error_reply(instruction.envelope, str(error))
        except WorkerFailed as error:
            self.breaker.crashed(run, str(error))
            disabled = self.breaker.circuit.disabled
            self._tell("worker_failed", reason=str(error), crashes=self.breaker.circuit.crashes, disabled=disabled)
            return wire.error_reply(instruction.envelope, str(error))
        except IntegrityError as error:
            self._tell("worker_failed", reason=str(error))
            return wire.error_reply(instruction.envelope, str(error))

    def _flush(self, fresh: wire.WireReply | None = None) -> None:
        for reply in self.outbox.waiting(fresh):
            try:
                self.client.push(reply)
            except (Gone, IntegrityError) as error:  # the round or the run is over: nobody waits for it any more
                self._tell("dropped", message_id=reply.instruction_id, reason=str(error))
            self.outbox.remove(reply.instruction_id)

    def _heartbeat(self) -> None:
        """While the worker computes, or waits to be allowed to: stay online."""
        try:
            self.client.heartbeat()
        except (Unreachable, Unregistered, CertificateRefused, Gone, IntegrityError) as error:
            log.debug("heartbeat: %s", error)

    def _interrupt_on_stop(self) -> None:
        self._stop.wait()
        if self._wake is not None:
            self._wake.set()
        self.connection.interrupt()

    def _leave(self) -> None:
        """Best effort, so that the server sees us offline at once rather than when our session expires."""
        self.connection.close()
        if self.welcome is not None and self.client.node.node_id:
            with contextlib.suppress(Unreachable, Unregistered, CertificateRefused, Gone, IntegrityError):
                self.client.deactivate()
        self.connection.close()

    def _tell(self, event: str, **facts: Any) -> None:
        log.log(logging.DEBUG if event in ROUTINE else logging.INFO, "fleet link: %s", event, extra={"facts": facts})
        self._on_event(event, facts)
