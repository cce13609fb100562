"""The agent's side of the worker: a process with flwr and torch that is started on demand and kept warm for a while."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_clients.edge.data_state import usable
from fl_clients.training import frames
from fl_clients.training.fleet import Instruction
from fl_clients.training.outbox import parse_reply
from fl_core.contracts.errors import IntegrityError
from fl_core.flower.wire import WireReply

Process = subprocess.Popen[bytes]


class WorkerFailed(Exception):
    """The worker ended or answered nonsense; says how."""


class Stopped(Exception):
    """The agent is ending: the instruction stays unanswered and will be delivered again."""


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """memory_mb: of its data (RLIMIT_DATA), 0 = no bound; code and files that are only mapped do not count. nice: 0-19."""

    memory_mb: int = 0
    nice: int = 0


class WorkerProcess:
    """Runs one instruction at a time. ``idle_seconds`` after the last one the process is ended to free its memory.

    When memory runs out, the kernel ends the worker rather than the agent or another program of the device.
    """

    def __init__(
        self, command: Sequence[str], *, idle_seconds: float = 300.0, limits: WorkerLimits | None = None
    ) -> None:
        self.command, self.idle_seconds, self.limits = list(command), idle_seconds, limits or WorkerLimits()
        self.counts: dict[str, int] = {}  # application -> examples, as the worker told last
        self._process: Process | None = None
        self._last_used = time.monotonic()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def run(self, instruction: Instruction, tick: Callable[[], None], *, tick_seconds: float = 20.0) -> WireReply:
        """``tick`` is called at least every ``tick_seconds`` while the worker computes; it may raise Stopped."""
        try:
            return self._exchange(self._running(), instruction, tick, tick_seconds)
        except BaseException:
            self.kill()  # whatever it is doing now, its next answer would not be the one that is asked for
            raise
        finally:
            self._last_used = time.monotonic()

    def _exchange(
        self, process: Process, instruction: Instruction, tick: Callable[[], None], tick_seconds: float
    ) -> WireReply:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            request = {"message_id": instruction.message_id, "ids": list(instruction.objects)}
            frames.write_frame(process.stdin, request, list(instruction.objects.values()))
            while not select.select([process.stdout], [], [], tick_seconds)[0]:
                tick()
            frame = frames.read_frame(process.stdout, origin="worker")
        except (OSError, IntegrityError) as error:
            raise WorkerFailed(f"the worker process {self._ending(process)}: {error}") from None
        if frame is None:
            raise WorkerFailed(f"the worker process {self._ending(process)}")
        told = frame[0].get("counts")
        if isinstance(told, dict):
            self.counts = {name: number for name, number in told.items() if usable(name, number)}
        header: dict[str, object] = {
            **frame[0],
            "run_id": instruction.run_id,
            "instruction_id": instruction.message_id,
        }
        try:
            return parse_reply(header, frame[1], origin="worker")
        except IntegrityError as error:
            raise WorkerFailed(error.message) from None

    def pause(self) -> None:
        """Stop it in the middle of whatever it does, until ``resume``."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def idle_left(self) -> float:
        """Seconds until it counts as idle; infinite while there is no process."""
        if self.pid is None:
            return math.inf
        return max(0.0, self.idle_seconds - (time.monotonic() - self._last_used))

    def end_if_idle(self) -> None:
        if self.pid is not None and time.monotonic() - self._last_used >= self.idle_seconds:
            self.close()

    def close(self) -> None:
        """End of input is the worker's signal to leave; one that stays is killed."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self.kill()

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()

    def _running(self) -> Process:
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self._process is None:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            try:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            except OSError as error:
                raise WorkerFailed(f"the worker process could not be started: {error}") from None
            _limit(self._process.pid, self.limits)
        return self._process

    def _ending(self, process: Process) -> str:
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -signal.SIGKILL:
            return "was ended by signal 9: out of memory, or by another program"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _limit(pid: int, limits: WorkerLimits) -> None:
    """Before the new process has done anything; what this system does not offer is left out."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError):
        if limits.nice:
            os.setpriority(os.PRIO_PROCESS, pid, limits.nice)
    if limits.memory_mb:
        try:
            size = limits.memory_mb << 20
            resource.prlimit(pid, resource.RLIMIT_DATA, (size, size))
        except (OSError, ValueError, AttributeError) as error:
            raise WorkerFailed(f"the worker's memory cannot be limited here: {error}") from None
