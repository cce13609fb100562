"""SCAFFOLD with a personal layer over real agents, TLS and torch workers: their states on disk, and the simulated twin."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_core.contracts import checkpoint as checkpoints
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from simulations.simulate import simulate
from tests.federation import DeviceProcess, new_home, running
from tests.helpers import eventually

CLIENTS = ("client-0000", "client-0001")
COMMON = ["data.clients=2", "data.holdout_fraction=0.0", "algorithm.min_clients=2"]
SCAFFOLD = [*COMMON, "algorithm.name=scaffold", "algorithm.personal=['head.bias']"]


class Fleet:
    """Two devices with their data and states in their own folders."""

    def __init__(self, superlink: Any, folder: Path) -> None:
        app = application("toy_regression")
        raw = app.generate(app.configure(COMMON), 0)
        self.folder, self.agents, self.killed = folder, [], 0
        for name in CLIENTS:
            raw.select([name]).write(folder / "data" / name)
            worker = [sys.executable, "-m", "fl_clients.training.worker", "--name", name]
            worker += ["--data", str(folder / "data" / name), "--states", str(folder / "states" / name)]
            self.agents.append(DeviceProcess(superlink.url, superlink.home.ca_file, folder, name, worker))
            superlink.registry.register(name, keys.public_pem(self.agents[-1].key))
            self.agents[-1].start()

    def kill_workers(self) -> None:
        """kill -9 of every training worker, by its command line; returns when they are dead."""
        killed = [entry for entry in Path("/proc").glob("[0-9]*") if self._is_worker(entry)]
        for entry in killed:
            os.kill(int(entry.name), signal.SIGKILL)
        self.killed += len(killed)
        eventually(lambda: all(self._is_dead(entry) for entry in killed))

    @staticmethod
    def _is_dead(process: Path) -> bool:
        """A process that is still being taken down has its pipes open, and its parent may write to it."""
        try:
            return (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def _is_worker(self, process: Path) -> bool:
        """An agent's command line holds the worker's too, behind its own."""
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return words[1:3] == [b"-m", b"fl_clients.training.worker"] and str(self.folder).encode() in b"".join(words)


def federate(folder: Path, overrides: list[str], rounds: int, *, kill_after: int) -> tuple[Path, list[RoundRecord]]:
    app = application("toy_regression")
    config = app.configure(overrides)
    with running(new_home(folder / "home")) as superlink:
        fleet, grid = Fleet(superlink, folder), superlink.grid()

        def on_round(record: RoundRecord) -> None:
            if record.round == kill_after:
                fleet.kill_workers()

        try:
            grid.wait_devices(2, 60)
            engine = RoundEngine(
                grid=grid, application=app, config=config, start=None, initial=get_arrays(app.build_model(config)),
                num_rounds=rounds, seed=0, out=folder / "out", stage="federated", on_round=on_round,
            )  # fmt: skip
            final = engine.run()
            grid.close(completed=True)
        finally:
            for agent in fleet.agents:
                agent.stop()
    assert fleet.killed == len(CLIENTS), "one worker a device, and no agent"
    return final, engine.history.records


@pytest.mark.slow
def test_states_on_devices_survive_killed_workers_and_equal_the_simulation(tmp_path: Path) -> None:
    final, history = federate(tmp_path, SCAFFOLD, 3, kill_after=2)
    assert [sorted(r.clients) for r in history] == [list(CLIENTS)] * 3
    app = application("toy_regression")
    config = app.configure(SCAFFOLD)
    raw = app.generate(config, 0)
    twin = simulate(app, config, raw, start=None, num_rounds=3, seed=0, out=tmp_path / "sim", workers=1)
    found, expected = checkpoints.load(final).arrays, checkpoints.load(twin.final).arrays
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    for name in CLIENTS:
        kept = sorted(p.name for p in (tmp_path / "states" / name).rglob("*.safetensors"))
        assert kept == [f"{r}.safetensors" for r in (1, 2, 3)], "the counted one, and the two newest of the others"
