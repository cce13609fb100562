"""Latency of a model on this machine: cold load, first inference, then wall times of single queries."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall times in milliseconds of one query at a time; ``batch`` is the number of examples in a query.

    cpu_p50_ms: processor time of the calling thread, which is all of it with one thread; other load on the machine
    does not count in it, so that it is the one to compare two models by.
    """

    load_ms: float
    first_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    cpu_p50_ms: float
    queries: int
    batch: int

    def to_json(self) -> dict[str, float | int]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def measure(
    session: Session, inputs: Mapping[str, npt.NDArray[Any]], *, seconds: float = 1.0, queries: int = 200
) -> Timing:
    """Run ``inputs`` as one query until ``queries`` were made or ``seconds`` have passed, whichever is first.

    At least five queries are made. MLPerf's single stream asks for queries=1024 and 60 s at the least.
    """
    batch = session.check(inputs)
    size = max(batch, 1)
    started = time.perf_counter()
    session.run(inputs, batch_size=size)
    first = (time.perf_counter() - started) * 1e3
    walls: list[float] = []
    cpus: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(walls) < 5 or (len(walls) < queries and time.perf_counter() < deadline):
        before, busy = time.perf_counter(), time.thread_time()
        session.run(inputs, batch_size=size)
        walls.append((time.perf_counter() - before) * 1e3)
        cpus.append((time.thread_time() - busy) * 1e3)
    p50, p90, p99 = (float(v) for v in np.percentile(walls, [50, 90, 99]))
    return Timing(
        load_ms=session.load_ms,
        first_ms=first,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        max_ms=max(walls),
        cpu_p50_ms=float(np.median(cpus)),
        queries=len(walls),
        batch=batch,
    )


def measure_side_by_side(
    sessions: Sequence[Session], inputs: Mapping[str, npt.NDArray[Any]], *, rounds: int = 7, seconds: float = 0.15
) -> list[float]:
    """Processor milliseconds of one query in each session, for comparing them on a machine that does other work too.

    The sessions take turns, and the least of a session's medians counts: load comes and goes, a model's cost does not.
    """
    best = [float("inf")] * len(sessions)
    for _ in range(rounds):
        for i, session in enumerate(sessions):
            best[i] = min(best[i], measure(session, inputs, seconds=seconds, queries=50).cpu_p50_ms)
    return best
