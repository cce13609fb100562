"""Asynchronous training over real agents, TLS and torch workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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


def federate(folder: Path, overrides: list[str], rounds: int) -> tuple[Path, list[RoundRecord]]:
    app = application("toy_regression")
    config = app.configure(overrides)
    with running(new_home(folder / "home")) as superlink:
        fleet, grid = Fleet(superlink, folder), superlink.grid()

        try:
            grid.wait_devices(2, 60)
            engine = RoundEngine(
                grid=grid, application=app, config=config, start=None, initial=get_arrays(app.build_model(config)),
                num_rounds=rounds, seed=0, out=folder / "out", stage="federated",
            )  # fmt: skip
            final = engine.run()
            grid.close(completed=True)
        finally:
            for agent in fleet.agents:
                agent.stop()
    return final, engine.history.records


def test_asynchronous_training_over_real_agents(tmp_path: Path) -> None:
    _, history = federate(tmp_path, STREAM, 4)
    assert [r.applied for r in history] == [True] * 4
    assert all(len(r.clients) == 1 for r in history)
    assert {name for r in history for name in r.clients} == set(CLIENTS)
