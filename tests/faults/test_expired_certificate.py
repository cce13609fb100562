"""The server's certificate expires while it runs: connections that stand go on, new ones are refused until it is renewed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fl_core.contracts.errors import EnvironmentFault
from fl_core.identity import ca, keys
from fl_server.home import certificate_hosts
from tests.fault_table import Fault
from tests.faults.test_federation_faults import begin, collect, values
from tests.federation import DeviceProcess, new_home, running
from tests.helpers import eventually, refusal
from tests.mqtt_helpers import free_port

LIFE_S = 15


@pytest.mark.slow
def test_it_expires_and_is_renewed(fault: Fault, tmp_path: Path) -> None:
    fault.about(
        "expired certificate", "while the server runs", "new connections refused and said; 'server renew' ends it"
    )
    home, port = new_home(tmp_path / "home"), free_port()
    hosts = certificate_hosts(home.settings.listen)
    days = (3600 + LIFE_S) / 86_400  # certificates begin an hour before they are made
    ca.issue_server_certificate(home.path / "ca", home.path / "tls", hosts, days=days)  # type: ignore[arg-type]
    device = DeviceProcess(f"https://127.0.0.1:{port}", home.ca_file, tmp_path, "van-1")
    try:
        with running(home, port=port) as superlink:
            superlink.registry.register("van-1", keys.public_pem(device.key))
            device.start()
            grid = superlink.grid()
            grid.wait_devices(1, 60)
            assert values(collect(grid, begin(grid), 60)["van-1"])
            eventually(lambda: refusal(EnvironmentFault, home.check), 60)
            assert values(collect(grid, begin(grid, 2), 60)["van-1"]), "the connection that stands goes on"
            device.stop(signal.SIGKILL)
            device.start()
            assert "expired" in device.wait_event("refused", 60)["reason"]
        with fault.recovery():
            home.renew()
            with running(home, port=port) as superlink:
                grid = superlink.grid()
                grid.wait_devices(1, 90)
                assert values(collect(grid, begin(grid, 3), 60)["van-1"])
                assert device.seen() == [1, 2, 3]
    finally:
        device.stop(signal.SIGKILL)
