"""One exchange of a round: instructions out, each reply looked at once, across restarts of the server.

Replies lie in the grid until the round is saved. An engine that was killed finds the same exchange again, waits only for
what is missing, and looks at the replies in the same order, so that it ends where an undisturbed one would have.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict

from fl_core.contracts.errors import IntegrityError
from fl_core.flower.adapter import Exchange, Partial
from fl_core.flower.grid import StreamGrid

PARTIAL_BYTES = 256 << 20  # of replies that may lie on disk, counted, before their sum is saved in their place
GRACE_SECONDS = 60.0  # an instruction outlives its round's deadline by this, for devices that are just sending

Look = Callable[[str, Message], int]


@dataclass
class Outcome:
    """looked: devices whose reply was counted or refused, in that order; refused: why; late: device -> instruction id."""

    looked: list[str] = field(default_factory=list)
    usable: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send, and when it is over. ``wanted``: usable replies that suffice (0 = wait for all).

    fingerprint: of what the request says; an exchange noted with another one is not ours.
    """

    group: str
    kind: str
    round: int
    fingerprint: str
    deadline_s: float
    keep_late: bool = False
    wanted: int = 0


class Talk:
    """Runs one Plan. look(device, reply) -> bytes of the reply, or raises IntegrityError: the reply is refused.

    With ``wanted`` = 0 replies are looked at in the order of device names, whatever the order of arrival, and the result
    depends on who answered only. With ``wanted`` > 0 they are looked at as they arrive, until enough are usable.

    partial() -> what has been counted so far, in pieces, or None where replies cannot be summed; facts() -> what the
    engine wants to have back with it. closing() is called when all waiting is over, before the end is noted.
    """

    def __init__(
        self,
        grid: StreamGrid,
        plan: Plan,
        look: Look,
        *,
        stop: threading.Event,
        partial: Callable[[], Partial | None] = lambda: None,
        facts: Callable[[], dict[str, Any]] = dict,
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        self.grid, self.plan, self.stop = grid, plan, stop
        self._look, self._partial, self._facts, self._closing = look, partial, facts, closing
        self.outcome = Outcome()
        self.exchange = self._found()
        self._unsaved = 0
        # What the outcome was when the partial result was saved: replies looked at later are looked at again.
        self._saved: dict[str, Any] | None = None if self.exchange is None else self.exchange.facts.get("saved")

    def _found(self) -> Exchange | None:
        found = self.grid.recall(self.plan.group)
        if found is not None and found.facts.get("fingerprint") != self.plan.fingerprint:
            self.grid.discard(found)
            return None
        return found

    @property
    def noted(self) -> dict[str, Any]:
        """What the engine noted last with an exchange that was interrupted; empty for a new one."""
        return {} if self.exchange is None else dict(self.exchange.facts.get("engine", {}))

    @property
    def counted(self) -> dict[str, Any]:
        """What the engine noted with the partial result; empty where there is none."""
        return {} if self._saved is None else dict(self._saved["engine"])

    def run(self, content: Callable[[], RecordDict], nodes: Mapping[str, int]) -> Outcome:
        """Send (unless it was sent before), look at the replies, and close: what comes later is late."""
        if self.exchange is None:
            self._send(content(), nodes)
        assert self.exchange is not None
        self._take_up()
        closed = self.exchange.facts.get("closed")
        if closed is not None:
            self._again(closed)
            return self.outcome
        if self.plan.wanted:
            self._by_arrival()
        else:
            self._by_name()
        self._close()
        return self.outcome

    def _send(self, content: RecordDict, nodes: Mapping[str, int]) -> None:
        plan, order = self.plan, sorted(nodes)
        ttl = plan.deadline_s * (2 if plan.keep_late else 1) + GRACE_SECONDS
        messages = [self.grid.create_message(content, plan.kind, nodes[n], plan.group, ttl=ttl) for n in order]
        exchange = Exchange(
            group=plan.group, round=plan.round, asked=dict.fromkeys(order, ""), nodes=nodes, facts=self._note()
        )
        self.exchange = self.grid.send(exchange, messages)

    def _note(self) -> dict[str, Any]:
        return {"fingerprint": self.plan.fingerprint, "engine": self._facts(), "saved": self._saved}

    def _take_up(self) -> None:
        """What the partial result holds is not looked at again."""
        if (saved := self._saved) is not None:
            self.outcome = Outcome(list(saved["looked"]), int(saved["usable"]), dict(saved["refused"]))

    def _again(self, closed: Mapping[str, Any]) -> None:
        """An exchange that was over when the engine was interrupted: the same replies, and no other."""
        for name in closed["looked"]:
            if name not in self.outcome.looked:
                self._look_at(name)
        self.outcome.late = dict(closed["late"])

    def _by_name(self) -> None:
        order, position = [n for n in self._asked if n not in self.outcome.looked], 0
        deadline = self.grid.now() + self.plan.deadline_s
        waiting = {self._asked[n] for n in order if self._asked[n]}
        while position < len(order):
            if self._asked[order[position]] in waiting:
                left = max(0.0, deadline - self.grid.now())  # 0: what arrived while others were counted is not late
                arrived = self.grid.wait_ready(waiting, left, self.stop)
                waiting -= arrived
                if not arrived:
                    break
                continue
            self._look_at(order[position])
            position += 1
        for name in order[position:]:  # after the deadline: what did arrive still counts, in order
            if self._asked[name] in waiting:
                self.outcome.late[name] = self._asked[name]
            else:
                self._look_at(name)

    def _by_arrival(self) -> None:
        names = {i: n for n, i in self._asked.items() if i and n not in self.outcome.looked}
        for name in [n for n, i in self._asked.items() if not i and n not in self.outcome.looked]:
            self._look_at(name)
        deadline = self.grid.now() + self.plan.deadline_s
        while names and self.outcome.usable < self.plan.wanted:
            arrived = self.grid.wait_ready(set(names), max(0.0, deadline - self.grid.now()), self.stop)
            if not arrived:
                break
            for message_id in self.grid.by_arrival(arrived):
                if self.outcome.usable >= self.plan.wanted:
                    break
                self._look_at(names.pop(message_id))
        self.outcome.late = {n: i for i, n in names.items()}

    @property
    def _asked(self) -> Mapping[str, str]:
        assert self.exchange is not None
        return self.exchange.asked

    def _look_at(self, name: str) -> None:
        size = 0
        try:
            if not self.grid.knows(name):
                raise IntegrityError(f"{name}: revoked, or registered no longer")
            message_id = self._asked[name]
            found = list(self.grid.pull_messages([message_id])) if message_id else []
            if not found:
                raise IntegrityError(f"{name}: no readable reply")
            size = self._look(name, found[0])
            self.outcome.usable += 1
        except IntegrityError as error:
            self.outcome.refused[name] = error.message
        self.outcome.looked.append(name)
        self._unsaved += size
        if self._unsaved >= PARTIAL_BYTES:
            self._save_partial()

    def _save_partial(self) -> None:
        partial = self._partial()
        if partial is None or self.exchange is None or "closed" in self.exchange.facts:
            return
        out, saved = self.outcome, set() if self._saved is None else set(self._saved["looked"])
        facts = {"engine": self._facts(), "looked": out.looked, "usable": out.usable, "refused": out.refused}
        self._saved, self._unsaved = json.loads(json.dumps(facts)), 0  # as it is now
        counted = [self._asked[n] for n in out.looked if self._asked[n] and n not in saved]
        self.grid.note(self.exchange, self._note(), partial=partial, forget=counted)

    def _close(self) -> None:
        self._closing()
        assert self.exchange is not None
        late = list(self.outcome.late.values())
        closed = {"looked": self.outcome.looked, "late": self.outcome.late}
        facts = {**self._note(), "closed": closed}
        if self.plan.keep_late:
            self.grid.note(self.exchange, facts, late=late)
        else:
            self.grid.note(self.exchange, facts, forget=late)
