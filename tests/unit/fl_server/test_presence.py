"""Who is asked: a device that the broker has lost is not, unless it waits at the server by itself."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.federation import joined, new_home, running
from tests.helpers import eventually


def test_a_device_that_the_broker_lost_is_offline_until_it_is_heard_from(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        client, grid = joined(superlink, tmp_path, "van-1"), superlink.grid()
        assert list(grid.device_names().values()) == ["van-1"]
        superlink.gone("van-1")
        superlink.gone("nobody")
        assert not grid.device_names()
        client.heartbeat()
        assert list(grid.device_names().values()) == ["van-1"]


def test_one_that_waits_at_the_server_is_there_without_the_broker(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        client, grid = joined(superlink, tmp_path, "van-1"), superlink.grid()
        ended: list[object] = []

        def wait() -> None:
            try:
                client.receive(60.0, every=60.0)
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: superlink.bell.waits(client.node.node_id), 60)
        superlink.gone("van-1")
        assert list(grid.device_names().values()) == ["van-1"]
        superlink.registry.revoke("van-1")
        superlink.fleet_watch.look()
        thread.join(60)
        assert not thread.is_alive()
        assert "revoked" in str(ended[0])
        assert not grid.device_names()
