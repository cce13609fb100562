"""Attacks on the signed repository: each is refused, and the model in use stays as it was."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from fl_clients.edge.installation import Request, run_update
from fl_clients.edge.slots import Slots, current_bundle
from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.delivery.keys import load_keys
from fl_core.delivery.publication import publish_bundle
from fl_core.runtime.golden import golden_check
from tests.bundles import TARGET, TOY, Files, damage, publish_toy, served, toy_bundle


class Fleet:
    """A repository at version 2 and a device that still runs version 1 and knows the first metadata."""

    def __init__(self, work: Path) -> None:
        self.work, self.repo, self.metadata = work, work / "repo", work / "repo" / "metadata"
        publish_toy(work, padding=20_000)
        self.update()
        self.old = work / "old"
        shutil.copytree(self.repo, self.old)
        publish_toy(work, seed=1, padding=20_000)

    def update(self, repository: str | None = None) -> dict[str, Any]:
        return run_update(
            Request(
                home=self.work / "home",
                application=TOY,
                channel="stable",
                target=TARGET,
                repository=repository or str(self.repo),
                root=self.repo / "metadata" / "1.root.json",
                ca=None,
                deadline=time.monotonic() + 30,
            )
        )

    def resign(self, name: str, change: Callable[[Any], None], *, role: str, keys: Path | None = None) -> None:
        """Change signed metadata and sign it with the keys of ``keys`` (the repository's own by default)."""
        metadata: Metadata[Any] = Metadata.from_file(str(self.metadata / name))
        change(metadata.signed)
        metadata.sign(load_keys(keys or self.work / "repo-keys")[role])
        metadata.to_file(str(self.metadata / name))

    def foreign_keys(self) -> Path:
        return publish_bundle(toy_bundle(self.work / "foreign"), self.work / "foreign-repo").keys


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def target_file(fleet: Fleet, version: int, end: str) -> Path:
    return next((fleet.repo / "targets" / TOY / str(version)).glob(f"*.{end}"))


def flipped_model(fleet: Fleet) -> None:
    damage(target_file(fleet, 2, "onnx"), 100)


def flipped_golden(fleet: Fleet) -> None:
    damage(target_file(fleet, 2, "golden.npz"))


def flipped_index(fleet: Fleet) -> None:
    for path in (fleet.repo / "targets" / TOY).glob("*.stable.json"):
        damage(path)


def longer_model(fleet: Fleet) -> None:
    with target_file(fleet, 2, "onnx").open("ab") as file:
        file.write(b"x" * 10_000_000)


def shorter_model(fleet: Fleet) -> None:
    path = target_file(fleet, 2, "onnx")
    path.write_bytes(path.read_bytes()[:-100])


def flipped_timestamp(fleet: Fleet) -> None:
    damage(fleet.metadata / "timestamp.json", 40)


def flipped_snapshot(fleet: Fleet) -> None:
    damage(fleet.metadata / "2.snapshot.json", 40)


def flipped_targets(fleet: Fleet) -> None:
    text = (fleet.metadata / "2.targets.json").read_text()
    (fleet.metadata / "2.targets.json").write_text(text.replace('"length":', '"length":1', 1))


def huge_timestamp(fleet: Fleet) -> None:
    with (fleet.metadata / "timestamp.json").open("ab") as file:
        file.write(b" " * 1_000_000)


def timestamp_of_another_key(fleet: Fleet) -> None:
    def next_version(signed: Any) -> None:
        signed.version += 1

    fleet.resign("timestamp.json", next_version, role="timestamp", keys=fleet.foreign_keys())


def targets_of_another_key(fleet: Fleet) -> None:
    fleet.resign("2.targets.json", lambda signed: None, role="targets", keys=fleet.foreign_keys())


def root_of_another_fleet(fleet: Fleet) -> None:
    foreign = fleet.foreign_keys()
    root: Metadata[Any] = Metadata.from_file(str(fleet.work / "foreign-repo" / "metadata" / "1.root.json"))
    root.signed.version = 2
    root.sign(load_keys(foreign)["root"])
    root.to_file(str(fleet.metadata / "2.root.json"))


def mixed_versions(fleet: Fleet) -> None:
    shutil.copyfile(fleet.metadata / "1.targets.json", fleet.metadata / "2.targets.json")


def expired(name: str, role: str) -> Callable[[Fleet], None]:
    def attack(fleet: Fleet) -> None:
        def past(signed: Any) -> None:
            signed.expires = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(hours=1)

        fleet.resign(name, past, role=role)

    return attack


REFUSED = {
    "flipped model": flipped_model,
    "flipped golden samples": flipped_golden,
    "flipped index": flipped_index,
    "endless model": longer_model,
    "cut model": shorter_model,
    "flipped timestamp": flipped_timestamp,
    "flipped snapshot": flipped_snapshot,
    "changed targets": flipped_targets,
    "endless timestamp": huge_timestamp,
    "timestamp of another key": timestamp_of_another_key,
    "targets of another key": targets_of_another_key,
    "root of another fleet": root_of_another_fleet,
    "mix and match": mixed_versions,
    "freeze: expired timestamp": expired("timestamp.json", "timestamp"),
    "expired snapshot": expired("2.snapshot.json", "snapshot"),
    "expired targets": expired("2.targets.json", "targets"),
}


@pytest.mark.parametrize("over_http", [False, True], ids=["folder", "http"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_attack_is_refused_and_the_model_stays(fleet: Fleet, name: str, over_http: bool) -> None:
    slots = Slots(fleet.work / "home")
    before = slots.identity()
    REFUSED[name](fleet)
    with served(fleet.repo) as (url, _), pytest.raises(IntegrityError):
        fleet.update(url if over_http else str(fleet.repo))
    assert slots.identity() == before
    bundle = current_bundle(fleet.work / "home")
    assert bundle is not None
    assert bundle.manifest.version == 1
    golden_check(bundle, TARGET)
    assert not list((fleet.work / "home" / "update").glob("partial/*"))


def test_without_an_attack_the_update_goes_through(fleet: Fleet) -> None:
    assert fleet.update()["version"] == 2


def test_after_the_attack_the_true_repository_is_accepted(fleet: Fleet) -> None:
    honest = fleet.work / "honest"
    shutil.copytree(fleet.repo, honest)
    flipped_model(fleet)
    with served(fleet.repo) as (url, _), pytest.raises(IntegrityError):
        fleet.update(url)
    with served(honest) as (url, _):
        assert fleet.update(url)["version"] == 2


def test_a_rollback_to_older_metadata_is_refused(fleet: Fleet) -> None:
    fleet.update()
    before = Slots(fleet.work / "home").identity()
    with pytest.raises(IntegrityError, match=r"refused: (BadVersionNumber|.*version)"):
        fleet.update(str(fleet.old))
    assert Slots(fleet.work / "home").identity() == before


def test_a_rollback_is_refused_even_when_the_metadata_cache_is_lost(fleet: Fleet) -> None:
    fleet.update()
    shutil.rmtree(fleet.work / "home" / "update" / "metadata")
    with pytest.raises(IntegrityError, match="offers version 1, older than 2"):
        fleet.update(str(fleet.old))
    bundle = current_bundle(fleet.work / "home")
    assert bundle is not None
    assert bundle.manifest.version == 2


def test_a_damaged_metadata_cache_heals(fleet: Fleet) -> None:
    for path in (fleet.work / "home" / "update" / "metadata").glob("*.json"):
        if not path.is_symlink():
            path.write_text("{broken")
    assert fleet.update()["version"] == 2


def test_a_repository_of_other_keys_is_refused_from_the_first_contact(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.foreign_keys()
    with pytest.raises(IntegrityError, match="refused"):
        fleet.update(str(tmp_path / "foreign-repo"))


class Dripping(Files):
    """Sends a few bytes at a time and never ends, without a length."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 1000)
        except OSError:
            pass


def test_endless_data_of_no_stated_length_ends_at_the_limit(fleet: Fleet) -> None:
    with served(fleet.repo, Dripping) as (url, _), pytest.raises((IntegrityError, RefusedError)):
        fleet.update(url)
    assert json.loads((fleet.work / "home" / "slots" / "state.json").read_text())["highest"] == 1
