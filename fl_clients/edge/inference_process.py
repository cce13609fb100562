"""The agent's side of the inference process: started with the first question, kept warm, ended when idle.

A crash of it (a model that is too large for the device, a fault in native code) is an error of one job, not of the agent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_clients.edge.settings import InferenceSettings
from fl_core.contracts.errors import (
    EnvironmentFault,
    ExitCode,
    FieldfleetError,
    GoalMissed,
    InputError,
    RefusedError,
)
from fl_core.link.backoff import Backoff

LOG = logging.getLogger(__name__)
ANSWER_LIMIT = 1 << 20
ERRORS: Mapping[int, type[FieldfleetError]] = {
    ExitCode.GOAL_MISSED: GoalMissed,
    ExitCode.WRONG_INPUT: InputError,
    ExitCode.ENVIRONMENT: EnvironmentFault,
    ExitCode.REFUSED: RefusedError,
}
Process = subprocess.Popen[bytes]


class ProcessEnded(EnvironmentFault):
    """It ended in the middle of a question: a crash, or it was killed for its memory."""


class InferenceProcess:
    """folders: application -> its own folder. Every method may be called from any thread."""

    def __init__(self, folders: Mapping[str, Path], settings: InferenceSettings) -> None:
        self.folders, self.settings = dict(folders), settings
        self.rss_mb: float | None = None  # of the process after its last answer; None while there is none
        self.crashes = 0
        self._serving: dict[str, Any] | None = None
        self._asking = threading.Lock()
        self._process: Process | None = None
        self._last_used = time.monotonic()
        self._backoff, self._restart_at = Backoff(1.0, 300.0), 0.0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def asking(self) -> bool:
        """A question is open."""
        return self._asking.locked()

    def infer(self, application: str, data: Path) -> dict[str, Any]:
        """See ``predictions.infer``. Raises its errors, or ProcessEnded."""
        with self._asking:
            return self._ask({"do": "infer", "application": application, "data": str(data)})

    def load(self, application: str) -> None:
        """Have the model in memory. Raises the error of one that cannot be used, ProcessEnded for one that kills."""
        with self._asking:
            self._ask({"do": "reload", "application": application})

    def reload(self, application: str) -> None:
        """Where the models are in memory: take the new one now. Raises the error of a model that cannot be used."""
        with self._asking:
            if self.pid is not None:
                self._ask({"do": "reload", "application": application})

    def serve(self, host: str, port: int) -> int:
        """Serve over gRPC from now on, restarted after each crash; the port. Raises EnvironmentFault: it is occupied."""
        with self._asking:
            self._serving = None
            bound = int(self._ask({"do": "serve", "host": host, "port": port})["port"])
            self._serving = {"do": "serve", "host": host, "port": bound}
            return bound

    def tick(self) -> None:
        """From time to time: end an idle process, start a serving one that crashed."""
        if not self._asking.acquire(blocking=False):
            return
        try:
            if self._serving is not None and self.pid is None and time.monotonic() >= self._restart_at:
                with contextlib.suppress(FieldfleetError):
                    self._start()
            idle = time.monotonic() - self._last_used
            if self._serving is None and self.pid is not None and 0 < self.settings.idle_s < idle:
                self._end(2.0)
        finally:
            self._asking.release()

    def close(self) -> None:
        """Also from another thread, while a question is open: its asker gets an error."""
        self._serving = None
        self._end(2.0)

    # inside

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._start()
        try:
            answer = self._exchange(process, request)
        finally:
            self._last_used = time.monotonic()
        if not answer["ok"]:
            kind = ERRORS.get(int(answer["code"]), EnvironmentFault)
            raise kind(str(answer["error"]), remedy=str(answer["remedy"]))
        self.rss_mb = answer.pop("rss_mb", None)
        del answer["ok"]
        self._backoff.reset()
        return answer

    def _exchange(self, process: Process, request: Mapping[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, or closed by another thread
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(ANSWER_LIMIT)
        try:
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
        except ValueError:
            pass
        raise ProcessEnded(
            f"the inference process {self._crashed(process)}",
            remedy="see its messages in the log; is there memory enough for the model?",
        )

    def _start(self) -> Process:
        """The running process, or a new one that serves again if it did before."""
        process = self._process
        if process is not None and process.poll() is None:
            return process
        if process is not None:
            LOG.error("agent: the inference process %s", self._crashed(process))
        command = [sys.executable, "-m", "fl_clients.edge.inference_worker", "--idle", str(self.settings.idle_s)]
        command += ["--threads", str(self.settings.threads)]
        for name, folder in self.folders.items():
            command += ["--application", f"{name}={folder}"]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ)
        except OSError as error:
            raise EnvironmentFault(f"the inference process could not be started: {error}") from None
        if self._serving is not None:
            answer = self._exchange(self._process, self._serving)
            if not answer.get("ok"):
                self._restart_at = time.monotonic() + self._backoff.next()
                self._end(2.0)
                raise EnvironmentFault(f"gRPC is not served: {answer.get('error')}")
        return self._process

    def _crashed(self, process: Process) -> str:
        self._end(1.0)
        self.crashes += 1
        self._restart_at = time.monotonic() + self._backoff.next()
        code = process.poll()
        if code is None:
            return "was stopped"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _end(self, patience_s: float) -> None:
        """End of input is its signal to leave; one that stays is killed."""
        process, self._process, self.rss_mb = self._process, None, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        if process.poll() is None:
            process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            assert process.stdout is not None
            process.stdout.close()
