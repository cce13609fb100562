"""Workers as Ray actors, one a CPU of the cluster.

The data and the model of an exchange are put into the object store once: Ray brings them to each node once, whatever the
number of actors there. What a unit leaves is one partial state, which stays in the object store of its node; two of them are
merged where they lie, and only the last one comes here. An actor that dies loses its units; they are handed out again, as
with processes. A node that dies takes the states that lie there with it: the clients of that exchange are trained again.
Every node needs fieldfleet installed, at the same version; algorithms
with states of clients also need the run folder on a file system that all nodes share.
"""

from __future__ import annotations

import logging
import os
import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_core.algorithms.base import State
from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.contracts.offswitches import set_off_switches
from simulations.engine.placement import Unit
from simulations.engine.summation import Merge
from simulations.engine.work import SUMS, Job
from simulations.engine.workers import Done, Lost, MakeWorker, StatesLost, Workers

set_off_switches()

MAX_LOSSES = 32  # actors lost one after the other, without a single unit done between
START_SECONDS = 120.0
LOCAL = "local"


class Actor:
    """The other end: pickled bytes in and out, so that the arrays are its own."""

    def __init__(self, make: MakeWorker) -> None:
        import torch

        torch.set_num_threads(1)
        self._worker = make()
        self._number = 0  # jobs count from 1
        self._fault = ""

    def begin(self, number: int, job: bytes) -> None:
        """Nobody waits for this call: why it failed is told by the next unit."""
        self._number, self._fault = number, ""
        try:
            self._worker.begin(pickle.loads(job))  # noqa: S301 from the driver of this job
        except Exception as error:
            self._fault = f"{type(error).__name__}: {error}"

    def run(self, number: int, unit: Unit) -> tuple[bytes, bytes]:
        """The result, and apart from it the partial state. Raises RuntimeError where job ``number`` did not begin here: whoever
        waits for its results would wait for ever."""
        if number != self._number:
            raise RuntimeError(f"job {number} did not reach this worker, which has job {self._number}")
        if self._fault:
            raise RuntimeError(f"job {number} did not begin: {self._fault}")
        found = self._worker.run(unit)
        return packed(replace(found, state=None)), b"" if found.state is None else packed(found.state)

    def pid(self) -> int:
        return os.getpid()

    def sees(self, file: str) -> bool:
        return os.path.exists(file)


class Held:
    """A partial state in the object store of some node."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference


def packed(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def merged(merge: Merge, left: bytes, right: bytes) -> bytes:
    """Runs on the node that has most of the two."""
    state = pickle.loads(left)  # noqa: S301 from an actor of this job
    merge(state, pickle.loads(right))  # noqa: S301 from an actor of this job
    return packed(state)


class RayWorkers(Workers):
    """address: "auto", "ray://HOST:PORT", "HOST:PORT", or "local:N" for a cluster of N CPUs on this machine.

    count: actors at most (0 = one a CPU); limit: never more than there are clients. shared: a folder that every actor must
    see. Raises EnvironmentFault when the cluster is unreachable, has no CPU, or has nodes without that folder.
    """

    def __init__(self, make: MakeWorker, address: str, *, count: int, limit: int, shared: Path | None = None) -> None:
        import ray

        self._ray, self._own = ray, connect(ray, address)
        cpus = int(sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
        self.count = min(count or cpus, limit)
        if self.count < 1 or cpus < 1:
            raise EnvironmentFault(f"--cluster {address}: it has no CPU for a worker")
        self._kind = ray.remote(num_cpus=1 if self.count <= cpus else cpus / self.count, max_restarts=0)(Actor)
        self._make = ray.put(make)
        self._merged = ray.remote(num_cpus=0)(merged)
        self._job: tuple[int, Any] | None = None  # its number and where it lies
        self._sums = False
        self._losses = 0
        self._actors = [self._start() for _ in range(self.count)]
        self._pending: dict[Any, tuple[int, Any]] = {}  # result -> its worker and its state
        if shared is not None:
            self._check_shared(shared)

    def _check_shared(self, folder: Path) -> None:
        """States that lie on the nodes' own disks would be lost between rounds, and nothing would tell."""
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".seen-{uuid.uuid4().hex}"
        mark.touch()
        try:
            asked = [actor.sees.remote(str(mark)) for actor in self._actors]
            missing = self._ray.get(asked, timeout=START_SECONDS).count(False)
        except self._ray.exceptions.RayError as error:
            self.close()
            raise EnvironmentFault(f"the workers on the cluster do not start: {str(error)[-500:]}") from None
        finally:
            mark.unlink(missing_ok=True)
        if missing:
            self.close()
            raise EnvironmentFault(
                f"{folder}: keeps what clients keep, and {missing} of {len(asked)} workers on the cluster do not see it",
                remedy="--out on a file system that all nodes share",
            )

    def _start(self) -> Any:
        actor: Any = self._kind.options(scheduling_strategy="SPREAD").remote(self._make)
        if self._job is not None:
            actor.begin.remote(*self._job)
        return actor

    def broadcast(self, job: Job) -> None:
        self._job, self._sums = (job.number, self._ray.put(packed(job))), job.kind == SUMS
        for actor in self._actors:
            actor.begin.remote(*self._job)

    def submit(self, worker: int, unit: Unit) -> None:
        if self._job is None:
            raise RuntimeError("a unit came before its job")
        result, state = self._actors[worker].run.options(num_returns=2).remote(self._job[0], unit)
        self._pending[result] = worker, state

    def events(self, timeout: float) -> list[Done | Lost]:
        if not self._pending:
            return []
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        found: list[Done | Lost] = []
        for reference in ready:
            worker, state = self._pending.pop(reference, (None, None))
            if worker is None:  # of a worker that was replaced meanwhile
                continue
            try:
                result = pickle.loads(self._ray.get(reference))  # noqa: S301 from our own actor
                if self._sums:
                    result.state = Held(state)
            except self._ray.exceptions.RayActorError as error:
                found.append(self._replace(worker, error))
                continue
            except self._ray.exceptions.RayError as error:
                raise EnvironmentFault(f"a worker on the cluster failed: {str(error)[-500:]}") from None
            self._losses = 0
            found.append(Done(worker, result))
        return found

    def merging(self, merge: Merge) -> Callable[[Any, Any], Held]:
        kept = self._ray.put(merge)
        return lambda left, right: Held(self._merged.remote(kept, self._place(left), self._place(right)))

    def _place(self, state: Any) -> Any:
        """Of a state that was made here, one that it is put to."""
        return state.reference if isinstance(state, Held) else self._ray.put(packed(state))

    def collected(self, state: Any) -> State:
        if not isinstance(state, Held):
            found: State = state
            return found
        try:
            found = pickle.loads(self._ray.get(state.reference))  # noqa: S301 from an actor of this job
        except self._ray.exceptions.RayError as error:
            raise StatesLost(f"partial states are lost: {str(error)[:300]}") from None
        return found

    def _replace(self, worker: int, error: Exception) -> Lost:
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise EnvironmentFault(
                f"workers on the cluster die again and again: {str(error)[:300]}", remedy="is there enough memory?"
            )
        self._pending = {r: pending for r, pending in self._pending.items() if pending[0] != worker}
        self._actors[worker] = self._start()
        return Lost(worker, "its process or node on the cluster died")

    def pids(self) -> list[int]:
        """On their machines; waits until every actor has started."""
        return list(self._ray.get([actor.pid.remote() for actor in self._actors], timeout=START_SECONDS))

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._pending, self.count = [], {}, 0
        if self._own:
            self._ray.shutdown()
            self._own = False


def connect(ray: Any, address: str) -> bool:
    """Whether this call opened the connection: an application that is connected already keeps its own."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"address": address}
    if address.startswith(LOCAL):
        # Without this address Ray joins a cluster that runs here already.
        options = {"address": LOCAL, "include_dashboard": False}
        number = address.removeprefix(LOCAL).removeprefix(":")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 1024:
            raise InputError(f"--cluster {address}: not usable", remedy="auto, ray://HOST:PORT, HOST:PORT or local:N")
        options["num_cpus"] = int(number)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future default; else it warns at each start
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"--cluster {address}: not reachable: {str(error)[:300]}", remedy="ray start --head there, or local:N here"
        ) from None
    return True
