"""The worker under the owner's policy: a message waits until training is allowed, and training that is not allowed any
more is paused.

The worker is stopped by SIGSTOP, not asked between batches: that holds within a fraction of a second whatever it is
doing, in native code too, and asks nothing of an application. What it has computed stays in its memory; SIGCONT goes
on with the same result to the bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from fl_clients.edge.policy import Decision, PolicySettings
from fl_clients.training.fleet import Instruction
from fl_clients.training.worker_process import Stopped, WorkerProcess
from fl_core.flower.wire import WireReply

LOOK_S, HEARTBEAT_S = 1.0, 20.0
# The server keeps a message for a minute longer than it waits for the reply; a refusal should reach it while it waits.
MARGIN_S = 65.0


class Declined(Exception):
    """The owner's policy does not let this message be answered in time; says why."""


class Permit(Protocol):
    """What the policy says of this moment; may be asked every second."""

    @property
    def policy(self) -> PolicySettings: ...

    def decide(self) -> Decision: ...

    def trained(self, seconds: float) -> None: ...

    def counted(self, application: str, number: int) -> None: ...


class Always:
    """No policy."""

    policy = PolicySettings(worker_nice=0)

    def decide(self) -> Decision:
        return Decision()

    def trained(self, seconds: float) -> None:
        """Nobody counts."""

    def counted(self, application: str, number: int) -> None:
        """Nobody asks."""


class Supervision:
    """heartbeat(): stay online at the server. tell(event, **facts): waiting, paused, resumed."""

    def __init__(
        self,
        worker: WorkerProcess,
        permit: Permit,
        heartbeat: Callable[[], None],
        tell: Callable[..., None],
    ) -> None:
        self._worker, self._permit, self._heartbeat, self._tell = worker, permit, heartbeat, tell

    def run(self, instruction: Instruction, stop: threading.Event) -> WireReply:
        """The worker's reply. Raises Declined, Stopped, or WorkerFailed."""
        latest = time.monotonic() + max(0.0, _ttl(instruction) - MARGIN_S)
        self._admit(latest, stop)
        watch = _Watch(self._worker, self._permit, latest, self._tell)
        beat = _Every(HEARTBEAT_S)

        def tick() -> None:
            if stop.is_set():
                raise Stopped
            watch.look()
            if beat.due():
                self._heartbeat()

        try:
            reply = self._worker.run(instruction, tick, tick_seconds=LOOK_S if self._watched else HEARTBEAT_S)
            for application, number in self._worker.counts.items():
                self._permit.counted(application, number)
            return reply
        finally:
            watch.end()

    @property
    def _watched(self) -> bool:
        return self._permit.policy.restricts

    def _admit(self, latest: float, stop: threading.Event) -> None:
        """Wait until training is allowed; raise Declined once it cannot be in time."""
        decision = self._permit.decide()
        if decision.allowed:
            return
        until = min(latest, time.monotonic() + self._permit.policy.wait_s)
        beat = _Every(HEARTBEAT_S)
        self._tell("waiting", reason=decision.reason)
        try:
            while not decision.allowed:
                left = until - time.monotonic()
                if left <= 0 or decision.lasts_s > left:
                    raise Declined(f"this device does not train now: {decision.reason}")
                if stop.wait(min(left, LOOK_S)):
                    raise Stopped
                if beat.due():
                    self._heartbeat()
                decision = self._permit.decide()
        finally:
            self._tell("resumed")


class _Watch:
    """Pauses and resumes the worker during one instruction, and counts the time that it was at work."""

    def __init__(self, worker: WorkerProcess, permit: Permit, latest: float, tell: Callable[..., None]) -> None:
        self._worker, self._permit, self._latest, self._tell = worker, permit, latest, tell
        self._paused_at: float | None = None
        self._at = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        self._count(now)
        decision = self._permit.decide()
        if decision.allowed:
            self._resume()
            return
        if self._paused_at is None:
            self._worker.pause()
            self._paused_at = now
            self._tell("paused", reason=decision.reason)
        left = min(self._latest, self._paused_at + self._permit.policy.pause_s) - now
        if left <= 0 or decision.lasts_s > left:
            raise Declined(f"training on this device was paused and given up: {decision.reason}")

    def end(self) -> None:
        self._count(time.monotonic())
        self._resume()

    def _resume(self) -> None:
        if self._paused_at is not None:
            self._worker.resume()
            self._paused_at = None
            self._tell("resumed")

    def _count(self, now: float) -> None:
        if self._paused_at is None:
            self._permit.trained(now - self._at)
        self._at = now


class _Every:
    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def _ttl(instruction: Instruction) -> float:
    """Seconds for which the server keeps the message, counted from its arrival: the clocks may differ."""
    ttl: Any = instruction.envelope.metadata.ttl
    return float(ttl)
