"""Simulations on a Ray cluster. The cluster itself needs the extra ``cluster`` and is slow to start."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.flower.messages import Request
from simulations.cluster.ray_workers import Actor, connect, packed
from simulations.engine.placement import Unit
from simulations.engine.work import SUMS, Job, UnitResult
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


def test_a_worker_that_did_not_take_a_job_says_why_and_runs_nothing_of_the_one_before() -> None:
    class Recorder:
        def begin(self, job: Job) -> None:
            self.job = job

        def run(self, unit: Unit) -> UnitResult:
            return UnitResult(self.job.number, unit)

    requests = [
        Request(application="toy_regression", config={}, arrays={}, round=n, num_rounds=2, seed=0) for n in (1, 2)
    ]
    jobs = [Job(request.round, SUMS, request) for request in requests]
    unit, actor = Unit(0, 0, ((0,),)), Actor(Recorder)
    with pytest.raises(RuntimeError, match="job 1 did not reach this worker"):
        actor.run(1, unit)
    actor.begin(1, packed(jobs[0]))
    assert pickle.loads(actor.run(1, unit)[0]).job == 1
    with pytest.raises(RuntimeError, match="job 2 did not reach this worker, which has job 1"):
        actor.run(2, unit)
    actor.begin(2, packed(jobs[1])[:-1] + b"?")
    with pytest.raises(RuntimeError, match="job 2 did not begin: UnpicklingError"):
        actor.run(2, unit)
    actor.begin(2, packed(jobs[1]))
    assert pickle.loads(actor.run(2, unit)[0]).job == 2


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
