"""The agent's decisions, without I/O: what to do with a command, and which periodic duty is due."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fl_core.link.envelope import Envelope

PING, UPDATE, INFER, REPORT, ENABLE, WAKE = "ping", "update", "infer", "report", "enable-training", "wake"
JOBS = (PING, UPDATE, INFER, REPORT, ENABLE)

Step = Literal["ring", "repeat", "ignore", "refuse", "run"]


@dataclass
class JobDesk:
    """Each job id is run to its end once; a repeated command gets the first reply again.

    finished(id): whether a reply is on disk. A job that was cut off by a crash has no reply, so it runs again when
    the server repeats it: every job here may be repeated without harm.
    """

    finished: Callable[[str], bool]
    running: set[str] = field(default_factory=set)

    def decide(self, command: Envelope) -> Step:
        if command.type == WAKE:
            return "ring"
        if self.finished(command.id):
            return "repeat"
        if command.id in self.running:
            return "ignore"
        if command.type not in JOBS:
            return "refuse"
        self.running.add(command.id)
        return "run"

    def done(self, job_id: str) -> None:
        self.running.discard(job_id)


@dataclass
class Schedule:
    """Periodic duties by name; an interval of 0 means never by itself. Times are seconds of any monotonic clock."""

    intervals: Mapping[str, float]
    due_at: dict[str, float] = field(default_factory=dict)

    def start(self, now: float) -> None:
        self.due_at = {name: now + every if every > 0 else math.inf for name, every in self.intervals.items()}

    def take_due(self, now: float) -> list[str]:
        """The duties to do now; each is next due one interval from now, however late it was."""
        due = [name for name, at in self.due_at.items() if at <= now]
        for name in due:
            self.due_at[name] = now + self.intervals[name]
        return due

    def hasten(self, name: str, at: float) -> None:
        """Do this duty no later than ``at``, once."""
        self.due_at[name] = min(self.due_at.get(name, math.inf), at)

    def seconds_left(self, now: float, *, at_most: float) -> float:
        return max(0.0, min([at_most, *(at - now for at in self.due_at.values())]))


def reply_body(*, ok: bool, **facts: Any) -> dict[str, Any]:
    return {"ok": ok, **facts}
