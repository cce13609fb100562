"""The agent's jobs: updates and inference of each application, one after the other, on a thread of their own."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fl_clients.edge.duties import INFER, UPDATE, reply_body
from fl_clients.edge.models import Models, NothingPublished
from fl_clients.edge.updater import UpdateResult
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """``application`` "" = all of them; ``job_id`` "" = nobody waits for a reply."""

    kind: str
    job_id: str = ""
    application: str = ""


class Listener(Protocol):
    """Who hears of the work; called on the work's thread."""

    def done(self, task: Task, body: dict[str, Any]) -> None: ...

    def updated(self, application: str, result: UpdateResult) -> None: ...

    def inferred(self, report: dict[str, Any]) -> None: ...


class Work:
    """put() from any thread; run() in one. errors: (kind, application) -> what went wrong last, until it goes well."""

    def __init__(self, models: Models, listener: Listener, *, infer_new: bool, stopping: Callable[[], bool]) -> None:
        self.models, self._listener, self._infer_new, self._stopping = models, listener, infer_new, stopping
        self.errors: dict[tuple[str, str], FieldfleetError] = {}
        self.inferences: dict[str, dict[str, Any]] = {}
        self.last_inference: dict[str, Any] | None = None
        self._inferred: dict[str, int] = {}
        self._open: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()

    def put(self, task: Task) -> None:
        with self._counting:
            self._open[task.kind] += 1
        self._tasks.put(task)

    def is_open(self, kind: str) -> bool:
        """Such a job waits or runs."""
        return self._open[kind] > 0

    def end(self) -> None:
        self._tasks.put(None)

    def run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._stopping():
            try:
                self._do(task)
            except Exception:  # a full disk under the outbox, say: the job stays open, and the server repeats it
                LOG.exception("agent: %s", task.kind)
            finally:
                with self._counting:
                    self._open[task.kind] -= 1

    def error_of(self, kind: str) -> FieldfleetError | None:
        return next((error for (found, _), error in self.errors.items() if found == kind), None)

    def failures(self) -> dict[str, str]:
        """Words for people: "update" on a device with one application, "update NAME" with several."""
        several = len(self.models.names) > 1
        return {
            f"{kind} {name}" if several and name else kind: error.message[:500]
            for (kind, name), error in list(self.errors.items())
        }

    def perform(self, kind: str, application: str = "") -> dict[str, Any]:
        """The reply's body: of the one application, or of each under its name. Errors are reported, never raised."""
        try:
            names = self.models.chosen(application)
        except FieldfleetError as error:
            self._failed(kind, "", error)
            return reply_body(ok=False, error=error.message[:500])
        self.errors.pop((kind, ""), None)
        bodies = {name: self._one(kind, name) for name in names}
        if len(bodies) == 1:
            return next(iter(bodies.values()))
        return reply_body(ok=all(body["ok"] for body in bodies.values()), applications=bodies)

    def _do(self, task: Task) -> None:
        body = self.perform(task.kind, task.application)
        self._listener.done(task, body)
        if task.kind != UPDATE or not self._infer_new:
            return
        for name in self.models.names:
            # a model that has not been run here yet, whether the update brought it now or before a restart
            version = self._version(name)
            if version is not None and version != self._inferred.get(name):
                self._inferred[name] = version
                self.put(Task(INFER, application=name))

    def _one(self, kind: str, name: str) -> dict[str, Any]:
        try:
            body = reply_body(ok=True, **(self._update(name) if kind == UPDATE else self._infer(name)))
            self.errors.pop((kind, name), None)
            return body
        except FieldfleetError as error:
            self._failed(kind, name, error)
        except Exception as error:
            LOG.exception("agent: %s %s", kind, name)
            self.errors[kind, name] = EnvironmentFault(f"{kind}: unexpected failure: {type(error).__name__}: {error}")
        return reply_body(ok=False, error=self.errors[kind, name].message[:500])

    def _failed(self, kind: str, name: str, error: FieldfleetError) -> None:
        level = logging.INFO if isinstance(error, NothingPublished) else logging.ERROR
        LOG.log(level, "agent: %s %s: %s", kind, name, error)
        self.errors[kind, name] = error

    def _update(self, name: str) -> dict[str, Any]:
        result = self.models.update(name)
        self._listener.updated(name, result)
        return {"changed": result.changed, "model": self.models.current(name)}

    def _infer(self, name: str) -> dict[str, Any]:
        report = self.inferences[name] = self.last_inference = self.models.infer(name)
        self._inferred[name] = report["model"]["version"]
        self._listener.inferred(report)
        return report

    def _version(self, name: str) -> int | None:
        model = self.models.current(name)
        return None if model is None else int(model["version"])
