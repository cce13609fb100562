"""Carries a device's records to its server: over MQTT while that stands, else in HTTPS requests; again until they are taken."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from fl_clients.connection import Transport, Unreachable
from fl_core.contracts.errors import FieldfleetError, RefusedError
from fl_core.link.backoff import Backoff
from fl_core.link.batch import TELEMETRY_PATH, taken_of
from fl_core.link.record_log import RecordLog

LOG = logging.getLogger(__name__)
ANSWER_S = 20.0  # for the server's word over MQTT
ANSWER_LIMIT = 4_096
FAILURES = (Unreachable, FieldfleetError)


class Channel(Protocol):
    """A way that answers later, by ``Courier.answered``."""

    def send_records(self, data: bytes) -> bool:
        """False when there is no connection."""
        ...


class Courier:
    """run() in a thread of its own; ``answered`` and ``ring`` from any thread. One batch is on its way at a time."""

    def __init__(
        self,
        records: RecordLog,
        channel: Channel,
        open_transport: Callable[[], Transport],
        *,
        answer_s: float = ANSWER_S,
        backoff: Backoff | None = None,
    ) -> None:
        self.records = records
        self._channel, self._open, self._answer_s = channel, open_transport, answer_s
        self._transport: Transport | None = None
        self._changed = threading.Condition()
        self._new = self._rung = False
        self._backoff = backoff or Backoff(2.0, 600.0)
        self._told = ""

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set, and ``interrupt`` called."""
        self.records.listen(self._note)
        try:
            while not stop.is_set():
                wait = self.records.due_in()
                if wait is None or wait > 0:
                    self._wait(lambda: self._new or self._rung or stop.is_set(), wait)
                elif not self._delivered(stop):  # a new record is no reason to try again sooner, a new connection is
                    self._wait(lambda: self._rung or stop.is_set(), self._backoff.next())
        finally:
            self.records.listen(None)
            self._let_go()

    def flush(self, seconds: float) -> bool:
        """Deliver everything now by requests, on the caller's thread; False when something is left."""
        deadline = time.monotonic() + seconds
        try:
            while (found := self.records.batch()) is not None:
                if time.monotonic() > deadline or not self._post(found[1], found[0].records[-1].seq):
                    return False
            return True
        except FAILURES as error:
            self._tell(str(error))
            return False
        finally:
            self._let_go()

    def interrupt(self) -> None:
        """End what ``run`` waits for."""
        transport = self._transport
        if transport is not None:
            transport.interrupt()
        self.ring()

    def ring(self) -> None:
        """The connection came or went."""
        with self._changed:
            self._rung = True
            self._changed.notify_all()

    def answered(self, store: str, upto: int) -> None:
        """The server's word."""
        self.records.taken(store, upto)
        with self._changed:
            self._changed.notify_all()

    def deliver(self, stop: threading.Event) -> bool:
        """Send the oldest batch; True once the server keeps it."""
        found = self.records.batch()
        if found is None:
            return True
        batch, data = found
        last = batch.records[-1].seq
        try:
            if self._channel.send_records(data):
                taken = self._taken(last, stop)
            else:
                taken = self._post(data, last)
        except FAILURES as error:
            self._tell(str(error))
            return False
        if taken:
            self._backoff.reset()
            self._told = ""
        return taken

    # inside

    def _delivered(self, stop: threading.Event) -> bool:
        try:
            return self.deliver(stop)
        except Exception:  # a full disk under the outbox, say: the records stay, and are tried again
            LOG.exception("records: not delivered")
            return False

    def _taken(self, last: int, stop: threading.Event) -> bool:
        def done() -> bool:
            return self._waits_from() > last

        with self._changed:
            self._changed.wait_for(lambda: done() or stop.is_set(), self._answer_s)
        return done()

    def _post(self, data: bytes, last: int) -> bool:
        if self._transport is None:
            self._transport = self._open()
        answer = self._transport.request("POST", TELEMETRY_PATH, data, limit=ANSWER_LIMIT)
        if answer.status != 200:
            raise RefusedError(f"{self._transport.url}: records refused: {answer.reason()}")
        try:
            table = json.loads(answer.body)
        except (ValueError, RecursionError):
            table = None
        self.answered(*taken_of(table, origin=self._transport.url))
        return self._waits_from() > last

    def _waits_from(self) -> float:
        first = self.records.first()
        return float("inf") if first is None else float(first)

    def _note(self) -> None:
        with self._changed:
            self._new = True
            self._changed.notify_all()

    def _wait(self, until: Callable[[], bool], seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(until, seconds)
            self._new = self._rung = False

    def _let_go(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            try:
                transport.close()
            except FieldfleetError as error:
                LOG.info("records: %s", error.message)

    def _tell(self, reason: str) -> None:
        if reason != self._told:
            LOG.warning("records: not delivered, tried again later: %s", reason)
        self._told = reason
