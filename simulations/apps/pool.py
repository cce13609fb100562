"""Where a ClientApp runs: in this process, or in worker processes of one thread each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Message
from flwr.clientapp import ClientApp

from fl_core.contracts.errors import EnvironmentFault, InputError
from simulations.apps.client import Client, answer, generators_kept
from simulations.apps.packing import Broadcast, ReplyReader, ReplyWriter, pack, unpack
from simulations.apps.worker import FAILED, FORK

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One message for one client. batch: messages that were sent together."""

    message_id: str
    message: Message
    client: Client
    state: bytes
    batch: int


@dataclass(frozen=True, kw_only=True)
class Done:
    """reply None: the worker died over this task."""

    task: Task
    reply: Message | None
    state: bytes


class Workers(Protocol):
    def idle(self) -> list[int]:
        """Workers that wait for a task, by number."""

    def submit(self, worker: int, task: Task) -> None: ...

    def poll(self, timeout: float) -> list[Done]:
        """What was finished; the empty list after ``timeout`` seconds."""

    def close(self) -> None: ...


class LocalWorker:
    """One worker, in this process; its task runs when it is polled for."""

    def __init__(self, app: ClientApp, spool: Path) -> None:
        self._app = app
        self._task: Task | None = None
        self._broadcast, self._writer, self._reader = Broadcast(), ReplyWriter(spool, "local"), ReplyReader(spool)

    def idle(self) -> list[int]:
        return [0] if self._task is None else []

    def submit(self, worker: int, task: Task) -> None:
        self._task = task

    def poll(self, timeout: float) -> list[Done]:
        if self._task is None:
            return []
        task, self._task = self._task, None
        packed, used, _ = pack(task.message, self._broadcast)
        message = unpack(packed, self._broadcast.payloads(used))
        with generators_kept():
            reply, state = answer(self._app, message, task.client, task.state)
        return [Done(task=task, reply=self._reader.unpack(*self._writer.pack(reply, task.batch)), state=state)]

    def close(self) -> None:
        self._writer.close()


class _Worker:
    """This end of one worker process."""

    def __init__(self, connection: Connection, pid: int, spool: Path) -> None:
        self.connection, self.pid, self.reader = connection, pid, ReplyReader(spool)
        self.known: set[int] = set()
        self.task: Task | None = None


class ProcessWorkers:
    """``count`` processes; one that dies is replaced. Raises InputError when the ClientApp cannot be imported."""

    def __init__(self, folder: Path, reference: str, count: int, spool: Path) -> None:
        self._command = [sys.executable, "-m", "simulations.apps.worker"]
        self._facts, self._spool = (str(folder), reference, str(spool)), spool
        self._broadcast = Broadcast()
        self._children: list[subprocess.Popen[bytes]] = []
        self._workers: dict[int, _Worker] = {}
        self._lost: list[Done] = []
        self._count = count
        self._wake = os.pipe()
        os.set_blocking(self._wake[1], False)
        self._control: Connection | None = self._start()

    def ready(self) -> None:
        """Wait for the import, then start all workers."""
        assert self._control is not None
        forks = self._loaded(self._control)
        starts: list[Callable[[], Connection]] = [self._fork] * self._count
        if not forks:
            first, self._control = self._control, None
            starts = [lambda: first, *[self._another] * (self._count - 1)]
        started = [start() for start in starts]
        for number, connection in enumerate(started):
            self._workers[number] = _Worker(connection, connection.recv(), self._spool)

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
            arguments = [*self._command, str(theirs.fileno()), *self._facts]
            self._children.append(  # what clients print is not our result: it goes to stderr
                subprocess.Popen(
                    arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, env=environment
                )
            )
        return Connection(ours.detach())

    def _loaded(self, control: Connection) -> bool:
        try:
            kind, first, remedy = control.recv()
        except (EOFError, OSError):
            raise EnvironmentFault("the worker process ended while it imported the ClientApp") from None
        if kind == FAILED:
            raise InputError(f"in a worker process: {first}", remedy=remedy)
        return bool(first)

    def _fork(self) -> Connection:
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs, socket.socket(fileno=os.dup(self._control.fileno())) as channel:
            socket.send_fds(channel, [FORK], [theirs.fileno()])
        return Connection(ours.detach())

    def _another(self) -> Connection:
        connection = self._start()
        self._loaded(connection)
        return connection

    def idle(self) -> list[int]:
        return [number for number, worker in self._workers.items() if worker.task is None]

    def submit(self, worker: int, task: Task) -> None:
        found = self._workers[worker]
        packed, used, size = pack(task.message, self._broadcast)
        fresh = self._broadcast.payloads([n for n in used if n not in found.known])
        kept = self._broadcast.kept(size)
        dropped = found.known - kept
        found.known = (found.known | set(fresh)) & kept
        found.task = task
        try:
            found.connection.send((packed, fresh, dropped, task.client, task.state, task.batch))
        except OSError:
            self._lost.append(self._replace(worker))
        with contextlib.suppress(BlockingIOError):  # a thread that polls learns of the new task
            os.write(self._wake[1], b"w")

    def poll(self, timeout: float) -> list[Done]:
        if self._lost:
            found, self._lost = self._lost, []
            return found
        busy: dict[Any, int] = {w.connection: n for n, w in self._workers.items() if w.task is not None}
        ready = wait([*busy, self._wake[0]], timeout)
        if self._wake[0] in ready:
            os.read(self._wake[0], 1 << 16)
        return [self._received(busy[connection]) for connection in ready if connection in busy]

    def _received(self, number: int) -> Done:
        worker = self._workers[number]
        assert worker.task is not None
        try:
            packed, file, state = worker.connection.recv()
        except (EOFError, OSError):
            return self._replace(number)
        task, worker.task = worker.task, None
        return Done(task=task, reply=worker.reader.unpack(packed, file), state=state)

    def _replace(self, number: int) -> Done:
        dead = self._workers[number]
        dead.connection.close()
        connection = self._fork() if self._control is not None else self._another()
        try:
            self._workers[number] = _Worker(connection, connection.recv(), self._spool)
        except (EOFError, OSError):
            raise EnvironmentFault(
                f"worker {dead.pid} died and cannot be replaced", remedy="is memory short? try fewer --workers"
            ) from None
        assert dead.task is not None
        return Done(task=dead.task, reply=None, state=dead.task.state)

    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers.values()]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.connection.close()  # an idle one ends by itself
            if worker.task is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        if self._control is not None:
            self._control.close()
        for end in self._wake:
            os.close(end)
        for child in self._children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
