"""Asynchronous training over real agents, TLS and torch workers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.errors import Interrupted
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from tests.federation import DeviceProcess, new_home, running

CLIENTS = ("client-0000", "client-0001")
COMMON = ["data.clients=2", "data.holdout_fraction=0.0", "algorithm.min_clients=2"]
STREAM = [*COMMON, "algorithm.name=fedbuff", "algorithm.mode=async", "algorithm.buffer=1", "algorithm.min_clients=1"]


class Fleet:
    """Two devices with their data and states in their own folders."""

    def __init__(self, superlink: Any, folder: Path) -> None:
        app = application("toy_regression")
        raw = app.generate(app.configure(COMMON), 0)
        self.folder, self.agents = folder, []
        for name in CLIENTS:
            raw.select([name]).write(folder / "data" / name)
            worker = [sys.executable, "-m", "fl_clients.training.worker", "--name", name]
            worker += ["--data", str(folder / "data" / name), "--states", str(folder / "states" / name)]
            self.agents.append(DeviceProcess(superlink.url, superlink.home.ca_file, folder, name, worker))
            superlink.registry.register(name, keys.public_pem(self.agents[-1].key))
            self.agents[-1].start()


def federate(folder: Path, overrides: list[str], enough: Callable[[RoundRecord], bool]) -> list[RoundRecord]:
    """Rounds until one of them is ``enough``: how soon a device's worker answers is not ours to say."""
    app, stop = application("toy_regression"), threading.Event()

    def look(record: RoundRecord) -> None:
        if enough(record):
            stop.set()

    config = app.configure(overrides)
    with running(new_home(folder / "home")) as superlink:
        fleet, grid = Fleet(superlink, folder), superlink.grid()

        try:
            grid.wait_devices(2, 60)
            engine = RoundEngine(
                grid=grid, application=app, config=config, start=None, initial=get_arrays(app.build_model(config)),
                num_rounds=10_000, seed=0, out=folder / "out", stage="federated", on_round=look, stop=stop,
            )  # fmt: skip
            with pytest.raises(Interrupted):
                engine.run()
            grid.close(completed=True)
        finally:
            for agent in fleet.agents:
                agent.stop()
    return engine.history.records


def test_asynchronous_training_over_real_agents(tmp_path: Path) -> None:
    heard = set[str]()

    def both_counted(record: RoundRecord) -> bool:
        heard.update(record.clients)
        return len(heard) == len(CLIENTS) and record.round >= 4

    history = federate(tmp_path, STREAM, both_counted)
    assert heard == set(CLIENTS)
    assert all(r.applied and len(r.clients) == 1 for r in history)
    # Both were sent the first model at once, so the slower one's first reply is as stale as there were models since.
    first = {name: next(r for r in history if name in r.clients) for name in CLIENTS}
    assert {name: r.staleness.get(name, 0) for name, r in first.items()} == {
        name: r.round - 1 for name, r in first.items()
    }
