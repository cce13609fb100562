"""kill -9 of the server at every point of a round: it goes on in the same round and ends where an undisturbed run ends.

Real server processes over TLS with two devices in processes of their own, which stay connected over the restart.
"""

from __future__ import annotations

import collections
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fl_core.contracts import checkpoint as checkpoints
from fl_core.identity import keys
from fl_server.history import read_history
from fl_server.home import ServerHome
from tests.federation import DeviceProcess, new_home
from tests.field import free_port
from tests.helpers import ROOT
from tests.killed_server import POINTS

NAMES = ("van-1", "lorry-2")
ROUNDS = 3
IN_CI = ("first reply counted", "training closed", "model half saved")  # the others in ``make test-slow``


def serve(home: ServerHome, out: Path, algorithm: str, point: str = "none") -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.killed_server", point, "server", "run", "toy_regression"]
    command += [
        "--home",
        str(home.path),
        "--rounds",
        str(ROUNDS),
        "--out",
        str(out),
        "--min-devices",
        "2",
        "--wait",
        "90",
    ]
    command += ["--set", f"algorithm.name={algorithm}", "--set", "algorithm.average_last=0.7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, timeout=200, check=False
    )
    return done.returncode, done.stderr


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[ServerHome, list[DeviceProcess]]]:
    port = free_port()
    home = new_home(folder / "home", port=port)
    registry = home.registry()
    devices = [DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, folder, name) for name in NAMES]
    try:
        for device in devices:
            registry.register(device.name, keys.public_pem(device.key))
            device.switch("vary", True)
            device.start()
        yield home, devices
    finally:
        registry.close()
        for device in devices:
            device.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Algorithm -> sha256 of the final model of a run that nothing disturbs."""

    @functools.cache
    def final(algorithm: str) -> str:
        folder = tmp_path_factory.mktemp(f"calm-{algorithm}")
        with fleet(folder) as (home, _):
            code, errors = serve(home, folder / "out", algorithm)
            assert code == 0, errors
        return checkpoints.load(folder / "out").manifest.model_sha256

    return final


@pytest.mark.parametrize(
    ("point", "algorithm"),
    [
        pytest.param(point, algorithm, marks=[] if point in IN_CI and algorithm == "fedadam" else [pytest.mark.slow])
        for point in POINTS
        for algorithm in ("fedavg", "fedadam")
    ],
)
def test_a_killed_server_ends_where_an_undisturbed_one_does(
    tmp_path: Path, undisturbed: Callable[[str], str], point: str, algorithm: str
) -> None:
    out = tmp_path / "out"
    with fleet(tmp_path) as (home, devices):
        code, errors = serve(home, out, algorithm, point)
        assert code == -9, errors
        assert not (out / "final").exists()
        code, errors = serve(home, out, algorithm)
        assert code == 0, errors
        for device in devices:
            assert device.process is not None
            assert device.process.poll() is None, f"a restart ended {device.name}: {device.log()}"
            asked = collections.Counter(device.seen())
            assert asked == dict.fromkeys(range(1, ROUNDS + 1), 2), "once to train, once to evaluate, never again"
    assert checkpoints.load(out).manifest.model_sha256 == undisturbed(algorithm)
    records = read_history(out)
    assert [(r.round, r.applied, r.refused, r.late) for r in records] == [
        (number, True, {}, []) for number in range(1, ROUNDS + 1)
    ]
    assert all(sorted(r.clients) == sorted(NAMES) == sorted(r.client_evaluation) for r in records)
