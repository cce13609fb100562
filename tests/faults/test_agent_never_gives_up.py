"""Whatever the server does, a device's agent goes on: it asks again, runs what is installed, and comes back by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import TOY
from tests.field import NAME, Field
from tests.helpers import eventually


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    found = Field(tmp_path)
    yield found
    found.stop()


def test_a_server_that_is_away_at_the_first_start_and_does_not_know_the_device_yet(field: Field) -> None:
    field.stop()
    with field.running("--no-train", "--no-infer", alive=False) as process:
        eventually(lambda: "server away" in field.log(), 60)
        field.start()
        eventually(lambda: "server refused" in field.log(), 60)
        assert "not registered" in field.log()
        field.register()
        assert field.bridge.wait_alive([NAME], 90), field.log()
        assert field.ask("ping")["ok"] is True
        assert field.device()["state"]["contact"]["state"] in ("starting", "ok")
        assert process.poll() is None
        assert "Traceback" not in field.log()


@pytest.mark.slow
def test_a_server_that_lost_its_memory_is_told_who_we_are_again(field: Field) -> None:
    """Meanwhile, and across a restart of the agent without its server, the installed model serves."""
    field.register()
    field.publish(0)
    with field.running("--no-train", "--serve", "0") as process:
        eventually(lambda: field.device()["state"].get("inference"), 60)
        field.stop()
        for file in field.home.path.glob("*.db*"):
            file.unlink()
        field.start()
        eventually(lambda: "server refused" in field.log(), 120)
        assert _serves(field)
        field.register()  # with another account at the broker than before
        assert field.bridge.wait_alive([NAME], 120), field.log()
        assert process.poll() is None
    field.stop()
    (field.work / "agent.log").unlink()
    with field.running("--no-train", "--serve", "0", alive=False) as process:
        eventually(lambda: "server away" in field.log(), 60)
        assert _serves(field)
        assert process.poll() is None
        field.start()
        assert field.bridge.wait_alive([NAME], 90), field.log()


def _serves(field: Field) -> bool:
    import tritonclient.grpc as triton

    found = eventually(lambda: re.search(r"gRPC on 127\.0\.0\.1:(\d+)", field.log()), 60)
    with triton.InferenceServerClient(f"127.0.0.1:{found[1]}") as client:
        return bool(client.is_model_ready(TOY))
