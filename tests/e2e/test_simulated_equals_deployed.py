"""A simulated and a deployed federation end in the same global weights: same round engine, same local update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fieldfleet.processes import Children, free_ports, listens
from fl_core.contracts.checkpoint import Checkpoint, load
from fl_core.contracts.config import to_table
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from simulations.simulate import simulate

SETTINGS = ["data.clients=2", "data.holdout_fraction=0.0", "model.hidden=16", "algorithm.local_epochs=2"]
ROUNDS = 3


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_same_weights(tmp_path: Path, algorithm: str) -> None:
    app = application("toy_regression")
    settings = [*SETTINGS, f"algorithm.name={algorithm}"]
    config = app.configure(settings)
    raw = app.generate(config, 0)
    manifest = CheckpointManifest(application=app.name, config=to_table(config), stage="pretrain")
    Checkpoint(manifest, get_arrays(app.build_model(config))).save(tmp_path / "start")
    start = load(tmp_path / "start")
    simulated = simulate(app, config, raw, start=start, num_rounds=ROUNDS, seed=0, out=tmp_path / "simulated")

    port, mqtt = free_ports(2)
    home = str(tmp_path / "home")
    options = [part for item in settings for part in ("--set", item)]
    with Children(tmp_path / "logs") as children:
        children.run("init", ["server", "init", home, "--port", str(port), "--mqtt-port", str(mqtt)])
        for name in raw.client_ids():
            agent = tmp_path / name
            raw.select([name]).write(tmp_path / f"{name}-data")
            ca = str(Path(home) / "ca" / "ca.pem")
            children.run(
                f"{name}-init", ["agent", "init", str(agent), "--server", f"https://127.0.0.1:{port}", "--ca", ca]
            )
            key = str(agent / "keys" / "device.pub")
            children.run(f"{name}-register", ["server", "register", key, "--name", name, "--home", home])
        run = [*("server", "run", app.name, "--home", home, "--from", str(tmp_path / "start"), "--rounds", str(ROUNDS))]
        children.start("server", [*run, "--out", str(tmp_path / "deployed"), "--min-devices", "2", "--stay", *options])
        children.until(lambda: listens(port), 60, "the server's start")
        for name in raw.client_ids():
            children.start(name, ["agent", "run", str(tmp_path / name), "--data", str(tmp_path / f"{name}-data")])
        children.until(lambda: (tmp_path / "deployed" / "final").is_dir(), 120, "the federation")

    ours, theirs = load(simulated.final).arrays, load(tmp_path / "deployed").arrays
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-6, err_msg=name)
