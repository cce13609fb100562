"""What the server's people ask of this device, by commands over MQTT: each is done once, and answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fl_clients.edge import duties
from fl_clients.edge.duties import JobDesk, reply_body
from fl_clients.edge.field_link import FieldLink
from fl_clients.edge.models import Models
from fl_clients.edge.work import Task, Work
from fl_core.contracts.errors import InputError
from fl_core.link.envelope import Envelope


class Orders:
    """ring(): a message waits on the server. facts() -> what a report says. enable() -> facts of the training that may go on."""

    def __init__(
        self,
        link: FieldLink,
        models: Models,
        work: Work,
        *,
        ring: Callable[[], None],
        facts: Callable[[], dict[str, Any]],
        enable: Callable[[], dict[str, Any]],
    ) -> None:
        self._link, self._models, self._work = link, models, work
        self._ring, self._facts, self._enable = ring, facts, enable
        self._desk = JobDesk(link.finished)

    def take(self, message: Envelope) -> None:
        step = self._desk.decide(message)
        if step == "ring":
            self._ring()
        elif step == "repeat":
            self._link.repeat(message.id)
        elif step == "refuse":
            self._answer(message, reply_body(ok=False, error=f"unknown command {message.type!r}"))
        elif step == "run" and message.type == duties.PING:
            self._answer(message, reply_body(ok=True, time=time.time(), boot=self._link.boot))
        elif step == "run" and message.type == duties.REPORT:
            self._answer(message, reply_body(ok=True, **self._facts()))
        elif step == "run" and message.type == duties.ENABLE:
            self._answer(message, reply_body(ok=True, training=self._enable()))
        elif step == "run":
            self._begin(message)

    def finish(self, job_id: str, kind: str, body: dict[str, Any]) -> None:
        try:
            self._link.finish(job_id, kind, body)
        finally:
            self._desk.done(job_id)

    def _answer(self, message: Envelope, body: dict[str, Any]) -> None:
        self.finish(message.id, message.type, body)

    def _begin(self, message: Envelope) -> None:
        application = message.body.get("application", "")
        try:
            self._models.chosen(application if isinstance(application, str) else repr(application))
        except InputError as error:
            self._answer(message, reply_body(ok=False, error=str(error)[:500]))
            return
        self._work.put(Task(message.type, message.id, application))
