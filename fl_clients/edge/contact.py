"""The agent's relation to its server: asks who we are until it is told, and again when something changed. It never ends
the agent: a server that is away, restarted empty, or does not know this device yet may do so tomorrow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fl_clients.connection import Unreachable, Welcome
from fl_core.contracts.errors import FieldfleetError
from fl_core.link.backoff import Backoff

LOG = logging.getLogger(__name__)
REFRESH_S = 6 * 3600.0
FIRST_S, FIRST_INCOMPLETE_S, OFTEN_S, SELDOM_S = 1.0, 10.0, 60.0, 600.0
TELL_EVERY_S = 30.0
OFTEN = 60  # attempts; a device that was refused for an hour need not ask every minute
State = Literal["starting", "ok", "away", "refused"]


@dataclass
class Contact:
    """What is known of the server, without I/O. ``since``, ``last``: seconds since 1970; last: of the last welcome."""

    clock: Callable[[], float] = time.time
    state: State = "starting"
    reason: str = ""
    since: float = 0.0
    last: float | None = None
    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_S, OFTEN_S))
    incomplete: Backoff = field(default_factory=lambda: Backoff(FIRST_INCOMPLETE_S, SELDOM_S))

    def note(self, state: State, reason: str = "") -> bool:
        """True when this is news."""
        news = state != self.state
        if news:
            self.since = self.clock()
        self.state, self.reason = state, reason[:500]
        if state == "ok":
            self.last = self.clock()
            self.backoff.reset()
        return news

    def pause(self, *, complete: bool) -> float:
        """Seconds until the next question. ``complete``: what the server told of works; else it may tell otherwise."""
        if self.state == "ok":
            if not complete:
                return self.incomplete.next()
            self.incomplete.reset()
            return REFRESH_S
        self.backoff.limit_s = OFTEN_S if self.backoff.attempts < OFTEN else SELDOM_S
        return self.backoff.next()

    def facts(self) -> dict[str, Any]:
        return {"state": self.state, "reason": self.reason, "since": round(self.since), "last": self.last}


class ContactKeeper:
    """run() in a thread of its own. ask() -> the server's welcome, or an error.

    welcomed(welcome): for each answer; changed(): the state is another one; complete(): see ``Contact.pause``;
    tell(): tells the server our state, on that thread, after ``tell_soon``; it raises what ``ask`` raises.
    """

    def __init__(
        self,
        ask: Callable[[], Welcome],
        *,
        welcomed: Callable[[Welcome], None],
        changed: Callable[[], None],
        complete: Callable[[], bool],
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self.contact = Contact(since=time.time())
        self._ask, self._welcomed, self._changed, self._complete = ask, welcomed, changed, complete
        self._tell, self._untold = tell, False
        self._ring = threading.Event()
        self._ask_at, self._tell_at = 0.0, 0.0

    def ring(self) -> None:
        """Ask now, or notice the end."""
        self._ask_at = 0.0
        self._ring.set()

    def ring_if_not_ok(self) -> None:
        """Another conversation with the server works again: so does this one."""
        if self.contact.state != "ok":
            self.ring()

    def doubt(self) -> None:
        """What the server told of does not work any more (its broker): ask again, unless it comes back soon."""
        if self.contact.state == "ok":
            self._ask_at = min(self._ask_at, time.monotonic() + self.contact.incomplete.next())
            self._ring.set()

    def tell_soon(self) -> None:
        """As soon as the server answers; news within ``TELL_EVERY_S`` are told together."""
        self._untold = True
        self._ring.set()

    def run(self, stop: threading.Event) -> None:
        refresh_at = 0.0
        while not stop.is_set():
            now = time.monotonic()
            if now >= self._ask_at:
                if self.contact.state != "ok" or now >= refresh_at or not self._complete() or not self._ask_at:
                    self._try()
                    refresh_at = now + REFRESH_S
                self._ask_at = time.monotonic() + self.contact.pause(complete=self._complete())
            if self._untold and self.contact.state == "ok" and now >= self._tell_at:
                self._untold, self._tell_at = False, now + TELL_EVERY_S
                self._attempt(self._tell)
                if self.contact.state != "ok":
                    self._ask_at = time.monotonic() + self.contact.pause(complete=True)
            due = min(self._ask_at, self._tell_at) if self._untold and self.contact.state == "ok" else self._ask_at
            self._ring.wait(max(0.0, due - time.monotonic()))
            self._ring.clear()

    def note(self, state: State, reason: str = "") -> None:
        """What another conversation with the server has shown."""
        if self.contact.note(state, reason):
            self._changed()

    def _try(self) -> None:
        self._attempt(lambda: self._welcomed(self._ask()))

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
            self.note("ok")
        except Unreachable as error:
            self._failed("away", str(error))
        except FieldfleetError as error:
            self._failed("refused", str(error).replace("\n  remedy: ", "; "))
        except Exception as error:  # a full disk under welcome.json, say: the next attempt may do better
            LOG.exception("agent: contact with the server")
            self._failed("away", f"unexpected failure: {type(error).__name__}: {error}")

    def _failed(self, state: State, reason: str) -> None:
        if (state, reason) != (self.contact.state, self.contact.reason):
            LOG.warning("agent: server %s: %s", state, reason)
        self._untold = True  # after an outage the server should hear how we are
        self.note(state, reason)
