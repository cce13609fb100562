"""Two nodes: this machine and a network namespace behind a link of 10 Mbit/s that loses packets, met by c10d; the model is one node's."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fl_core.contracts import checkpoint as checkpoints
from tests.helpers import fieldfleet
from tests.lossy_link import HOST, INSIDE, lossy_link

pytestmark = pytest.mark.slow
SETTINGS = (
    "model.hidden=8",
    "model.norm=batch",
    "pretrain.batch_size=6",
    "pretrain.epochs=3",
    "optimizer.momentum=0.9",
)


def words(out: Path) -> list[str]:
    settings = [part for s in SETTINGS for part in ("--set", s)]
    return ["pretrain", "toy_regression", "--data", "generated", "--out", str(out), *settings]


@pytest.mark.timeout(300)
def test_two_nodes_train_the_model_of_one(tmp_path: Path) -> None:
    done = fieldfleet(*words(tmp_path / "one"), "--procs", "2", timeout=200)
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with lossy_link() as link, contextlib.ExitStack() as running:
        link.delay_s, link.loss, link.rate = 0.002, 0.01, 1.25e6  # 10 Mbit/s
        outside, inside = link.interfaces
        nodes = []
        for rank, (address, interface) in enumerate(((HOST, outside), (INSIDE, inside))):
            launcher = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOST}:{port}", "--rdzv-id", "two-nodes"),
                *("--rdzv-conf", f"is_host={1 - rank}", "--local-addr", address),
                *("-m", "fieldfleet", *words(tmp_path / "two")),
            ]
            node = subprocess.Popen(
                link.inside(launcher) if rank else launcher,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface},
                stderr=subprocess.PIPE,
                text=True,
            )
            running.callback(node.kill)
            nodes.append(node)
        for node in nodes:
            _, said = node.communicate(timeout=200)
            assert node.returncode == 0, said[-3000:]
        assert link.passed > 100, "the nodes did not talk over the link"
        assert link.lost > 0
    one, two = (checkpoints.load(tmp_path / name / "final").arrays for name in ("one", "two"))
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array, err_msg=name)  # two processes both times: the same sums
