"""Unmodified Flower programs: a flower-supernode takes part in a run beside our agent, and flwr's client lists it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
from flwr.supercore.control.control_http_client import ControlHttpClient

from fl_core.contracts import checkpoint as checkpoints
from fl_core.identity import keys
from fl_core.learning.application import application
from tests.federation import new_home, new_key, running
from tests.helpers import ROOT
from tests.mqtt_helpers import free_port
from tests.standing import Standing, standing, until


@contextmanager
def stock_node(port: int, ca: Path, folder: Path, key: keys.PrivateKey, *options: str) -> Iterator[Path]:
    """The real flower-supernode; yields its log."""
    openssh = serialization.PrivateFormat.OpenSSH  # the only form that it reads
    (folder / "ssh.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    )
    programs = Path(sys.executable).parent
    command = [str(programs / "flower-supernode"), "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
    command += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(folder / "ssh.key"), *options]
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    with (folder / "stock.log").open("wb") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield folder / "stock.log"
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.mark.slow
def test_a_stock_supernode_joins(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        key = new_key(tmp_path)
        superlink.registry.register("stock", keys.public_pem(key))
        with stock_node(superlink.port, superlink.home.ca_file, tmp_path, key):
            grid = superlink.grid()
            grid.wait_devices(1, 60)
            assert list(grid.device_names().values()) == ["stock"]


def own_agent(server: Standing, folder: Path, data: Path) -> subprocess.Popen[bytes]:
    token = server.run("fleet", "token", "create", "--auto-approve")["token"]
    command = [sys.executable, "-m", "fieldfleet", "agent"]
    done = subprocess.run(
        [*command, "init", str(folder), "--token", token, "--name", "ours", "--application", "toy_regression"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (folder / "agent.log").open("wb") as log:
        run = [*command, "run", str(folder), "--data", str(data), "--no-infer"]
        return subprocess.Popen(run, cwd=ROOT, stdout=log, stderr=log)


@pytest.mark.slow
def test_it_trains_in_the_same_run_as_our_agent_and_flwr_lists_both(tmp_path: Path) -> None:
    app = application("toy_regression")
    raw = app.generate(app.configure(["data.clients=2"]), 0)
    for name, client in zip(("stock", "ours"), raw.client_ids(), strict=True):
        raw.select([client]).write(tmp_path / "data" / name)  # type: ignore[attr-defined]
    with standing(tmp_path) as server:
        key = new_key(tmp_path)
        registry = server.home.registry()
        registry.register("stock", keys.public_pem(key))
        registry.close()
        agent = own_agent(server, tmp_path / "agent", tmp_path / "data" / "ours")
        config = f'name="stock" data="{tmp_path / "data" / "stock"}"'
        port = server.home.settings.listen.port
        try:
            with stock_node(port, server.home.ca_file, tmp_path, key, "--node-config", config) as log:
                options = (
                    "--min-devices",
                    "2",
                    "--set",
                    "algorithm.min_clients=2",
                    "--set",
                    "algorithm.deadline_s=120",
                )
                server.run("runs", "start", "toy_regression", "--name", "both", "--rounds", "2", *options)
                until(lambda: server.facts("both")["rounds_done"] >= 1)
                client = ControlHttpClient(f"http://127.0.0.1:{server.home.settings.metrics.port}")
                runs = client.ListRuns(ListRunsRequest(limit=5)).run_dict
                assert len(runs) == 1
                nodes = client.ListNodes(ListNodesRequest()).nodes_info
                assert [node.status for node in nodes] == ["online", "online"]
                until(lambda: server.facts("both")["status"] != "running")
                history = server.run("runs", "show", "both")["history"]
                assert [sorted(r["clients"]) for r in history] == [["ours", "stock"]] * 2, log.read_text()[-3000:]
                final = checkpoints.load(server.home.path / "runs" / "both" / "final")
                assert final.manifest.clients_seen == ["ours", "stock"]
        finally:
            agent.terminate()
            agent.wait(30)
        assert server.end() == 0
