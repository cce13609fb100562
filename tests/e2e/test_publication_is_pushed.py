"""``publish`` reaches devices without their asking: over MQTT, and over HTTPS in the answer to the waiting long poll."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_clients.edge.slots import Slots
from fl_core.delivery.publication import publish_bundle
from fl_server.repository_files import RepositoryFiles
from tests.bundles import TOY, mean_bundle
from tests.field import Field
from tests.helpers import eventually


@pytest.mark.parametrize("mqtt", ["embedded", "off"])
def test_a_publication_is_installed_at_once(tmp_path: Path, mqtt: str) -> None:
    field = Field(tmp_path, mqtt=mqtt)
    try:
        field.register()
        options = ["--no-train"] if mqtt == "embedded" else []
        with field.running(*options, alive=mqtt == "embedded"):
            eventually(lambda: "published no model yet" in field.log(), 60)
            if mqtt == "off":
                eventually(lambda: field.superlink.bell._doors, 60)
            field.publish(0)
            eventually(lambda: _version(field) == 1, 60)
            publish_bundle(mean_bundle(field.work / "driver", "driver_conflict"), field.home.repository)
            field.publish(1)
            eventually(lambda: _version(field) == 2, 60)
            assert "Traceback" not in field.log()
    finally:
        field.stop()


def _version(field: Field) -> int | None:
    model = Slots(field.agent / "applications" / TOY).facts()
    return None if model is None else int(model["version"])


def test_the_server_knows_what_its_repository_offers(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    files = RepositoryFiles(repository)
    assert (files.generation(), files.offers()) == (None, {})
    publish_bundle(mean_bundle(tmp_path / "a", "driver_conflict"), repository)
    first = files.generation()
    assert files.offers() == {"driver_conflict": {"stable": 1}}
    publish_bundle(mean_bundle(tmp_path / "b", TOY), repository, channel="beta")
    publish_bundle(mean_bundle(tmp_path / "c", "driver_conflict", seed=1), repository)
    assert files.offers() == {"driver_conflict": {"stable": 2}, TOY: {"beta": 1}}
    assert first is not None
    assert (files.generation() or 0) > first
    (repository / "metadata" / "timestamp.json").write_text("damaged")
    assert (files.generation(), files.offers()) == (None, {})
