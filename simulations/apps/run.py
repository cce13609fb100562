"""A whole Flower project, from its folder to the end of its ServerApp."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict

from fl_core.contracts.errors import FieldfleetError, InputError
from fl_core.flower.adapter import apps as adapter
from fl_core.learning import seeding
from simulations.apps.client import seed_everything
from simulations.apps.grid import RUN, AppGrid, Tally
from simulations.apps.pool import LocalWorker, ProcessWorkers, Workers
from simulations.apps.project import FlowerProject, describe, loaded
from simulations.apps.states import ClientStates


@dataclass(frozen=True, kw_only=True)
class AppResult:
    """context: of the ServerApp after its end. start_s: until its main began; main_s: from there to the end."""

    tally: Tally
    context: Context
    start_s: float
    main_s: float


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def simulate_app(
    project: FlowerProject,
    *,
    num_clients: int,
    seed: int = 0,
    workers: int | None = None,
    on_reply: Callable[[Tally], None] = lambda tally: None,
) -> AppResult:
    """Run the project's ServerApp over ``num_clients`` of its ClientApp.

    workers: processes of one thread each (default: one a core); 0 = in this process. Process-wide generators (random,
    numpy, torch) are seeded by ``seed``: in the ServerApp once, in a client for each message; the result does not depend on
    ``workers``, unless the app itself draws seeds elsewhere.

    Raises InputError: a component that cannot be imported, or an error of the ServerApp's own code.
    """
    began = time.monotonic()
    logging.getLogger("flwr").propagate = False  # it prints its own lines
    with tempfile.TemporaryDirectory(prefix="fieldfleet-") as folder, contextlib.ExitStack() as stack:
        spool = Path(folder)
        pool, ready = _pool(project, cores() if workers is None else workers, spool)
        stack.callback(pool.close)
        server = loaded(adapter.load_server_app, project.server, project.folder)
        ready()
        states = ClientStates(spool)
        stack.callback(states.close)
        grid = AppGrid(
            pool, count=num_clients, run_config=project.run_config, seed=seed, states=states, on_reply=on_reply
        )
        context = Context(
            run_id=RUN,
            node_id=adapter.SERVER_NODE,
            node_config={},
            state=RecordDict(),
            run_config=dict(project.run_config),
        )
        seed_everything(seeding.key(seed, "flower app", "server"))
        started = time.monotonic()
        with own_errors(project), contextlib.redirect_stdout(sys.stderr):
            server(grid, context)
        return AppResult(tally=grid.tally, context=context, start_s=started - began, main_s=time.monotonic() - started)


def _pool(project: FlowerProject, count: int, spool: Path) -> tuple[Workers, Callable[[], None]]:
    """(workers, what to call before the first message): processes import while this one does."""
    if count == 0:
        return LocalWorker(loaded(adapter.load_client_app, project.client, project.folder), spool), lambda: None
    processes = ProcessWorkers(project.folder, project.client, count, spool)
    return processes, processes.ready


@contextlib.contextmanager
def own_errors(project: FlowerProject) -> Iterator[None]:
    try:
        yield
    except FieldfleetError:
        raise
    except Exception as error:
        raise InputError(f"{project.name}: the ServerApp failed: {describe(error, project.folder)}") from error
