"""An unmodified flower-supernode with a registered key joins: the endpoint speaks Flower's own Fleet API."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from fl_core.identity import keys
from tests.federation import new_home, new_key, running
from tests.mqtt_helpers import free_port


@pytest.mark.slow
def test_a_stock_supernode_joins(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        key = new_key(tmp_path)
        superlink.registry.register("stock", keys.public_pem(key))
        openssh = serialization.PrivateFormat.OpenSSH  # the only form that it reads
        private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
        (tmp_path / "ssh.key").write_bytes(private)
        command = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"127.0.0.1:{superlink.port}"]
        command += ["--root-certificates", str(superlink.home.ca_file), "--port", str(free_port())]
        command += ["--auth-supernode-private-key", str(tmp_path / "ssh.key")]
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, "FLWR_HOME": str(tmp_path / "flwr")}
        with (tmp_path / "log").open("wb") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            grid = superlink.grid()
            grid.wait_devices(1, 60)
            assert list(grid.device_names().values()) == ["stock"]
        finally:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
