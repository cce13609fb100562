"""A real federation: the server and two agents in separate processes, over TLS, with torch workers; and its simulated twin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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

CLIENTS = ("client-0000", "client-0001")
ROUNDS = 6
OVERRIDES = ["data.clients=2", "data.holdout_fraction=0.0", "model.hidden=4", "algorithm.min_clients=2"]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RoundRecord]]:
    """(final checkpoint, history) of a run over two device processes whose data lies in their own folders."""
    folder = tmp_path_factory.mktemp("deployed")
    app = application("toy_regression")
    config = app.configure(OVERRIDES)
    raw = app.generate(config, 0)
    with running(new_home(folder / "home")) as superlink:
        agents = []
        for name in CLIENTS:
            data = folder / "data" / name
            raw.select([name]).write(data)
            worker = [sys.executable, "-m", "fl_clients.training.worker", "--name", name, "--data", str(data)]
            agents.append(DeviceProcess(superlink.url, superlink.home.ca_file, folder, name, worker))
            superlink.registry.register(name, keys.public_pem(agents[-1].key))
            agents[-1].start()
        grid = superlink.grid()
        try:
            grid.wait_devices(2, 60)
            engine = RoundEngine(
                grid=grid,
                application=app,
                config=config,
                start=None,
                initial=get_arrays(app.build_model(config)),
                num_rounds=ROUNDS,
                seed=0,
                out=folder / "out",
                stage="federated",
            )
            final = engine.run()
            grid.close(completed=True)
            assert superlink.store._state.num_message_ins() == 0
            assert len(superlink.store._state.object_store) == 0
        finally:
            codes = [agent.stop() for agent in agents]
        assert codes == [0, 0]
        assert not grid.device_names(), "devices that end say so"
    return final, engine.history.records


def test_every_device_took_part_in_every_round(deployed: tuple[Path, list[RoundRecord]]) -> None:
    _, history = deployed
    assert [sorted(record.clients) for record in history] == [list(CLIENTS)] * ROUNDS
    assert not any(record.refused or record.late for record in history)
    losses = [record.loss for record in history]
    assert losses[-1] < losses[0]  # type: ignore[operator]


def test_a_round_takes_at_most_half_a_second(deployed: tuple[Path, list[RoundRecord]]) -> None:
    """Training and evaluation of a trivial model, checkpoint included; the first round starts the workers."""
    _, history = deployed
    seconds = sorted(record.seconds for record in history[1:])
    assert seconds[0] <= 0.5, seconds


def test_the_simulated_federation_ends_in_the_same_weights(
    deployed: tuple[Path, list[RoundRecord]], tmp_path: Path
) -> None:
    final, _ = deployed
    app = application("toy_regression")
    config = app.configure(OVERRIDES)
    twin = simulate(app, config, app.generate(config, 0), start=None, num_rounds=ROUNDS, seed=0, out=tmp_path / "sim")
    found, expected = checkpoints.load(final), checkpoints.load(twin.final)
    assert found.manifest.clients_seen == expected.manifest.clients_seen
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_checkpoint_says_where_it_comes_from(deployed: tuple[Path, list[RoundRecord]]) -> None:
    manifest = checkpoints.load(deployed[0]).manifest
    assert (manifest.application, manifest.stage, manifest.step) == ("toy_regression", "federated", ROUNDS)
    assert json.loads((deployed[0] / "manifest.json").read_text())["clients_seen"] == list(CLIENTS)
