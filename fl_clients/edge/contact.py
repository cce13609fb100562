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
FIRST_S, FIRST_INCOMPLETE_S, OFTEN_S, SELDOM_S = 1.0, 5.0, 60.0, 600.0
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

    welcomed(welcome): for each answer; changed(): the state is another one; complete(): see ``Contact.pause``.
    """

    def __init__(
        self,
        ask: Callable[[], Welcome],
        *,
        welcomed: Callable[[Welcome], None],
        changed: Callable[[], None],
        complete: Callable[[], bool],
    ) -> None:
        self.contact = Contact(since=time.time())
        self._ask, self._welcomed, self._changed, self._complete = ask, welcomed, changed, complete
        self._ring = threading.Event()

    def ring(self) -> None:
        """Ask now, or notice the end."""
        self._ring.set()

    def ring_if_not_ok(self) -> None:
        """Another conversation with the server works again: so does this one."""
        if self.contact.state != "ok":
            self._ring.set()

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self._try()
            self._ring.wait(self.contact.pause(complete=self._complete()))
            self._ring.clear()

    def note(self, state: State, reason: str = "") -> None:
        """What another conversation with the server has shown."""
        if self.contact.note(state, reason):
            self._changed()

    def _try(self) -> None:
        try:
            self._welcomed(self._ask())
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
        self.note(state, reason)
