"""One run: devices -> rounds -> checkpoints, over a server that serves them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.learning.application import Application
from fl_server.device_states import fleet_selector
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from fl_server.home import ServerHome
from fl_server.superlink import SuperLink

STAGE = "federated"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """min_devices are waited for, ``wait_seconds`` at most, before the first round. grid: the run's name in the SuperLink."""

    home: ServerHome
    name: str
    application: Application
    config: Any
    start: Checkpoint | None
    num_rounds: int
    seed: int
    out: Path
    grid: str
    min_devices: int
    wait_seconds: float


@dataclass(frozen=True)
class RunResult:
    final: Path
    history: list[RoundRecord]
    devices: tuple[str, ...]


def initial_arrays(application: Application, config: Any, start: Checkpoint | None) -> Arrays:
    """The arrays of the starting checkpoint, or of a fresh model."""
    if start is not None:
        return start.arrays
    from fl_core.learning.torch_arrays import get_arrays

    return get_arrays(application.build_model(config))


def federate(
    options: RunOptions,
    superlink: SuperLink,
    *,
    stop: threading.Event | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> RunResult:
    """The whole run, or the rest of it. Raises RefusedError without devices, Interrupted when ``stop`` is set."""
    grid = superlink.grid(options.grid)
    if not (options.out / "final").is_dir():
        grid.wait_devices(max(1, options.min_devices), options.wait_seconds, stop)
    engine = RoundEngine(
        grid=grid,
        application=options.application,
        config=options.config,
        start=options.start,
        initial=initial_arrays(options.application, options.config, options.start),
        num_rounds=options.num_rounds,
        seed=options.seed,
        out=options.out,
        stage=STAGE,
        on_round=on_round,
        selector=fleet_selector(options.config, options.application.name, superlink, options.seed),
        stop=stop,
    )
    devices = tuple(sorted(grid.device_names().values()))
    final = engine.run()
    grid.close(completed=True)  # an interrupted run stays open: the same command goes on in the same round
    return RunResult(final, engine.history.records, devices)
