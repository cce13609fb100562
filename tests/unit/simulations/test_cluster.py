"""Simulations on a Ray cluster. The cluster itself needs the extra ``cluster`` and is slow to start."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fl_core.contracts.errors import EnvironmentFault, InputError
from simulations.cluster.ray_workers import connect
from tests.helpers import ROOT, run_python


def no_ray(error: Exception | None = None) -> SimpleNamespace:
    """What ``connect`` asks of the package, with a cluster that cannot be reached."""

    def init(**options: object) -> None:
        if error is not None:
            raise error

    return SimpleNamespace(is_initialized=lambda: False, init=init)


@pytest.mark.parametrize("address", ["local:", "local:0", "local:many", "local:-1", "localhost", "local:99999"])
def test_wrong_addresses_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="auto, ray://HOST:PORT, HOST:PORT or local:N"):
        connect(no_ray(), address)


def test_a_cluster_that_cannot_be_reached_is_told_with_its_remedy() -> None:
    with pytest.raises(EnvironmentFault, match="not reachable: nobody there") as refused:
        connect(no_ray(ConnectionError("nobody there")), "ray://trainer:10001")
    assert "local:N" in refused.value.remedy


@pytest.mark.slow
def test_a_cluster_of_two_nodes_and_killed_workers_end_in_the_bits_of_one_machine(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra cluster")
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    done = run_python(["tests/cluster_run.py", str(tmp_path)], environment=environment, cwd=ROOT, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["nodes"], found["killed"]) == (2, 2)
    assert len(set(found["models"])) == 1
    assert len(set(found["clients"])) == 1, "each client counted exactly once"
    assert found["refused"] == [0, 0, 0]
    model, refusal = found["scaffold"]
    assert model
    assert "1 of 1 workers on the cluster do not see it" in refusal
