"""The written batch script under the distribution's own Slurm, on this machine: stopped by its signal, requeued, same weights.

``apt-get install slurm-wlm`` brings what it takes; munge, slurmctld and slurmd run here as whoever runs the test, on their own ports.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_core.contracts import checkpoint as checkpoints
from tests.helpers import eventually, fieldfleet

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
PATHS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(shutil.which(t, path=PATHS) for t in TOOLS), reason="Slurm is not installed"),
]
SETTINGS = (
    "model.hidden=8",
    "model.norm=batch",
    "pretrain.batch_size=3",
    "pretrain.epochs=8",
    "optimizer.momentum=0.9",
)
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """One node, this machine."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "PATH": PATHS, "SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run([*map(str, words)], env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        facts = dict(p.split("=", 1) for p in self("scontrol", "show", "job", job, "--oneliner").split() if "=" in p)
        return facts["JobState"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host, folder=folder, user=getpass.getuser(), ports=free_ports(2), cores=len(os.sched_getaffinity(0))
        )
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    found = Cluster(folder)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    )
    with contextlib.ExitStack() as running:
        for words in daemons:
            log = running.enter_context((folder / f"{words[0]}.out").open("w"))
            daemon = subprocess.Popen(words, env=found.environment, stdout=log, stderr=log)
            running.callback(daemon.wait)
            running.callback(daemon.terminate)
            if words[0] == "munged":
                eventually((folder / "munge.socket").exists, 20)
        eventually(lambda: "idle" in _answer(found), 60, interval=0.2)
        yield found


def _answer(cluster: Cluster) -> str:
    """Empty while the controller does not listen yet."""
    words = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(words, env=cluster.environment, capture_output=True, text=True, check=False).stdout


@pytest.mark.timeout(600)
def test_a_job_told_to_stop_checkpoints_and_ends_after_a_requeue_with_the_undisturbed_weights(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = [part for s in (*SETTINGS, "pretrain.checkpoint_steps=5") for part in ("--set", s)]
    train = ["toy_regression", "--data", "generated", *options]
    done = fieldfleet("pretrain", *train, "--out", tmp_path / "calm", "--procs", "2", timeout=200)
    assert done.returncode == 0, done.stderr
    script, run = tmp_path / "train.sbatch", tmp_path / "run"
    done = fieldfleet(
        "slurm", *train, "--tasks-per-node", "2", "--out", run, "--script", script, "--environment", sys.prefix
    )
    assert done.returncode == 0, done.stderr
    log = tmp_path / "job.log"
    job = cluster("sbatch", "--parsable", f"--output={log}", script).strip()
    eventually(lambda: list(run.glob("epoch-*-step-*")) or cluster.state(job) not in ("PENDING", "RUNNING"), 120)
    assert cluster.state(job) == "RUNNING", log.read_text()
    cluster("scancel", f"--signal={signal.SIGUSR1.name.removeprefix('SIG')}", job)
    eventually(lambda: cluster.state(job) == "FAILED", 60)  # exit code 130
    assert "told to stop after step" in log.read_text()
    assert not (run / "final").exists()
    cluster("scontrol", "requeue", job)
    eventually(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 120)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    found, expected = (checkpoints.load(folder / "final").manifest.model_sha256 for folder in (run, tmp_path / "calm"))
    assert found == expected
