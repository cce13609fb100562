"""Workers as processes of this machine, forked where that is possible, so that they share the data in memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from fl_core.contracts.errors import EnvironmentFault
from simulations.engine.placement import Unit
from simulations.engine.work import Job, UnitResult
from simulations.engine.workers import Done, Lost, MakeWorker, Workers

MAX_LOSSES = 8  # workers lost one after the other, without a single unit done between
CLOSE_SECONDS = 5.0
YOUNG = 20_000  # new objects before a worker looks for cycles: the facts of a unit's clients are none


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessWorkers(Workers):
    """``count`` processes. make() builds the worker, in the child when it is forked; a spawned child gets it pickled."""

    def __init__(self, make: MakeWorker, count: int) -> None:
        self.count = count
        self._make = make
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: BaseContext = multiprocessing.get_context(method)
        self._ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._job: bytes = b""
        self._losses = 0
        gc.freeze()  # what exists now is not visited by the children's collector: its pages stay shared
        for _ in range(count):
            process, end = self._start()
            self._processes.append(process)
            self._ends.append(end)

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        inherited = [ours, *self._ends] if self._context.get_start_method() == "fork" else []
        process: BaseProcess = self._context.Process(  # type: ignore[attr-defined]
            target=serve, args=(theirs, self._make, inherited), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def pid(self, worker: int) -> int:
        return self._processes[worker].pid or 0

    def broadcast(self, job: Job) -> None:
        self._job = pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL)
        for end in self._ends:
            self._send(end, self._job)

    def submit(self, worker: int, unit: Unit) -> None:
        self._send(self._ends[worker], pickle.dumps(unit, protocol=pickle.HIGHEST_PROTOCOL))

    @staticmethod
    def _send(end: Connection, content: bytes) -> None:
        try:
            end.send_bytes(content)
        except OSError:
            return  # it died: the next look at events says so

    def events(self, timeout: float) -> list[Done | Lost]:
        ready = set(wait([*self._ends, *(p.sentinel for p in self._processes)], timeout))
        found: list[Done | Lost] = []
        for worker in range(self.count):
            end, process = self._ends[worker], self._processes[worker]
            if end in ready:
                event = self._receive(worker, end)
                found.append(event)
                if isinstance(event, Done):
                    self._losses = 0
                    continue
            elif process.sentinel in ready:
                found.append(Lost(worker, self._obituary(process)))
            else:
                continue
            self._replace(worker)
        return found

    def _receive(self, worker: int, end: Connection) -> Done | Lost:
        try:
            content: Any = pickle.loads(end.recv_bytes())  # noqa: S301 from our own child, over its own pipe
        except (EOFError, OSError, pickle.UnpicklingError):
            return Lost(worker, self._obituary(self._processes[worker]))
        if isinstance(content, UnitResult):
            return Done(worker, content)
        raise EnvironmentFault(f"a simulation worker failed: {content}")

    @staticmethod
    def _obituary(process: BaseProcess) -> str:
        process.join(CLOSE_SECONDS)
        code = process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with {code}"

    def _replace(self, worker: int) -> None:
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise EnvironmentFault(
                f"simulation workers die again and again: {self._obituary(self._processes[worker])}",
                remedy="is there enough memory? --workers takes fewer",
            )
        self._ends[worker].close()
        self._end_of(self._processes[worker])
        del self._ends[worker]  # the child must not inherit a closed end
        process, end = self._start()
        self._processes[worker] = process
        self._ends.insert(worker, end)
        if self._job:
            self._send(end, self._job)

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            self._end_of(process)
        self._ends, self._processes, self.count = [], [], 0

    @staticmethod
    def _end_of(process: BaseProcess) -> None:
        process.terminate()
        process.join(CLOSE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def serve(end: Connection, make: MakeWorker, inherited: Sequence[Connection]) -> None:
    """A child's life: jobs and units in, results out, until the other end is closed or gone."""
    for other in inherited:
        other.close()  # else a pipe whose parent was killed would never end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    try:
        worker = make()
        gc.freeze()
        gc.set_threshold(YOUNG, 10, 10)
        while True:
            content: Any = pickle.loads(end.recv_bytes())  # noqa: S301 from the process that started this one
            if isinstance(content, Job):
                worker.begin(content)
            else:
                end.send_bytes(pickle.dumps(worker.run(content), protocol=pickle.HIGHEST_PROTOCOL))
    except (EOFError, OSError):
        return
    except Exception as error:  # a defect of ours, not of a client's code: the parent ends with it
        try:
            end.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
        except OSError:
            return
        raise
