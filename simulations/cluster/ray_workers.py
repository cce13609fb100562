"""Workers as Ray actors, one a CPU of the cluster.

The data and the model of an exchange are put into the object store once: Ray brings them to each node once, whatever the
number of actors there. What comes back for a unit is one partial state. An actor that dies, or whose node dies, loses its
units; they are handed out again, as with processes. Every node needs fieldfleet installed, at the same version; algorithms
with states of clients also need the run folder on a file system that all nodes share.
"""

from __future__ import annotations

import logging
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.contracts.offswitches import set_off_switches
from simulations.engine.placement import Unit
from simulations.engine.work import Job
from simulations.engine.workers import Done, Lost, MakeWorker, Workers

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

    def begin(self, job: bytes) -> None:
        self._worker.begin(pickle.loads(job))  # noqa: S301 from the driver of this job

    def run(self, unit: Unit) -> bytes:
        return pickle.dumps(self._worker.run(unit), protocol=pickle.HIGHEST_PROTOCOL)

    def pid(self) -> int:
        return os.getpid()

    def sees(self, file: str) -> bool:
        return os.path.exists(file)


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
        self._job: Any = None
        self._losses = 0
        self._actors = [self._start() for _ in range(self.count)]
        self._pending: dict[Any, int] = {}
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
            actor.begin.remote(self._job)
        return actor

    def broadcast(self, job: Job) -> None:
        self._job = self._ray.put(pickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL))
        for actor in self._actors:
            actor.begin.remote(self._job)

    def submit(self, worker: int, unit: Unit) -> None:
        self._pending[self._actors[worker].run.remote(unit)] = worker

    def events(self, timeout: float) -> list[Done | Lost]:
        if not self._pending:
            return []
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        found: list[Done | Lost] = []
        for reference in ready:
            worker = self._pending.pop(reference, None)
            if worker is None:  # of a worker that was replaced meanwhile
                continue
            try:
                result = pickle.loads(self._ray.get(reference))  # noqa: S301 from our own actor
            except self._ray.exceptions.RayActorError as error:
                found.append(self._replace(worker, error))
                continue
            except self._ray.exceptions.RayError as error:
                raise EnvironmentFault(f"a worker on the cluster failed: {str(error)[-500:]}") from None
            self._losses = 0
            found.append(Done(worker, result))
        return found

    def _replace(self, worker: int, error: Exception) -> Lost:
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise EnvironmentFault(
                f"workers on the cluster die again and again: {str(error)[:300]}", remedy="is there enough memory?"
            )
        self._pending = {reference: w for reference, w in self._pending.items() if w != worker}
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
