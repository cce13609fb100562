"""Names, index, keys and the signed repository's writer."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.metadata import Metadata

from fl_core.contracts.bundle import GOLDEN_NAME, SUMS_NAME
from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.contracts.manifests import MANIFEST_NAME
from fl_core.delivery import names
from fl_core.delivery.publication import publish_bundle
from fl_core.delivery.repository import KEEP_VERSIONS, Repository
from tests.bundles import TOY, damage, publish_toy, toy_bundle

INDEX = names.ChannelIndex(
    application=TOY,
    channel="stable",
    version=3,
    published="2026-01-02T03:04:05+00:00",
    model_sha256="ab" * 32,
    files={"model.x86.onnx": {"sha256": "00" * 32, "bytes": 1}, "model.arm64.onnx": {"sha256": "11" * 32, "bytes": 2}}
    | {name: {"sha256": "22" * 32, "bytes": 3} for name in (GOLDEN_NAME, MANIFEST_NAME)},
    targets={"x86": "model.x86.onnx", "arm64": "model.arm64.onnx"},
)


def tables(repo: Path) -> dict[str, int]:
    return {p.name: json.loads(p.read_text())["signed"]["version"] for p in (repo / "metadata").glob("*.json")}


def test_an_index_reads_back() -> None:
    assert names.read_index(INDEX.to_bytes(), application=TOY, channel="stable") == INDEX


def test_a_device_fetches_its_own_model_only() -> None:
    assert INDEX.files_for("x86") == (GOLDEN_NAME, MANIFEST_NAME, "model.x86.onnx")
    shared = dataclasses.replace(INDEX, targets={"x86": "model.x86.onnx", "arm64": "model.x86.onnx"})
    assert "model.x86.onnx" in shared.files_for("arm64")
    with pytest.raises(InputError, match=r"(?s)no model for edge target 'riscv'.*arm64, x86"):
        INDEX.files_for("riscv")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("application", "other"),
        ("channel", "beta"),
        ("version", True),
        ("version", 0),
        ("version", 2**60),
        ("files", {}),
        ("files", {"../evil": {"sha256": "00" * 32, "bytes": 1}}),
        ("files", {"a": {"sha256": "zz", "bytes": 1}}),
        ("files", {"a": {"sha256": "00" * 32, "bytes": -1}}),
        ("targets", {"x86": "absent"}),
        ("targets", {"x86": []}),
        ("published", 5),
        ("format_version", 99),
    ],
)
def test_a_wrong_index_names_its_field(key: str, value: object) -> None:
    data = json.dumps({**json.loads(INDEX.to_bytes()), key: value}).encode()
    with pytest.raises(IntegrityError, match=key.replace("_", ".")):
        names.read_index(data, application=TOY, channel="stable")


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_an_index_are_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        names.read_index(data, application=TOY, channel="stable")


@pytest.mark.parametrize("channel", ["", "1", "a/b", "..", "é"])
def test_unusable_channels_are_refused(channel: str) -> None:
    with pytest.raises(InputError):
        names.index_target(TOY, channel)


def test_the_first_publication_makes_keys_and_root(tmp_path: Path) -> None:
    done = publish_toy(tmp_path)
    assert (done.version, done.channel, done.root.name) == (1, "stable", "1.root.json")
    assert done.keys == tmp_path / "repo-keys"
    assert done.keys.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in done.keys.iterdir()} == {0o600}
    assert {p.name for p in done.keys.iterdir()} == {f"{r}.pem" for r in ("root", "targets", "snapshot", "timestamp")}
    assert not list((tmp_path / "repo").rglob("*.pem"))
    assert {"manifest.json", GOLDEN_NAME, SUMS_NAME, "model.x86.onnx"} == set(done.files)


def test_versions_grow_and_unchanged_root_stays(tmp_path: Path) -> None:
    root = publish_toy(tmp_path).root.read_bytes()
    second = publish_toy(tmp_path, seed=1)
    assert second.version == 2
    assert second.root.read_bytes() == root
    versions = tables(tmp_path / "repo")
    assert versions["timestamp.json"] == 2
    assert {"1.targets.json", "2.targets.json", "2.snapshot.json", "1.root.json"} <= set(versions)
    assert "2.root.json" not in versions


def test_the_published_manifest_carries_the_version(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    publish_toy(tmp_path, seed=1)
    store = Repository(tmp_path / "repo", tmp_path / "repo-keys")
    for version in (1, 2):
        data = store.read_target(names.file_target(TOY, version, MANIFEST_NAME))
        assert data is not None
        assert json.loads(data)["version"] == version
        sums = store.read_target(names.file_target(TOY, version, SUMS_NAME))
        assert sums is not None
        assert len(sums.splitlines()) == 3


def test_channels_are_independent_and_share_the_numbering(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    assert publish_toy(tmp_path, seed=1, channel="beta").version == 2
    store = Repository(tmp_path / "repo", tmp_path / "repo-keys")
    offered = {}
    for channel in ("stable", "beta"):
        data = store.read_target(names.index_target(TOY, channel))
        assert data is not None
        offered[channel] = names.read_index(data, application=TOY, channel=channel).version
    assert offered == {"stable": 1, "beta": 2}


def test_old_versions_are_pruned_but_never_one_that_a_channel_offers(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "b")
    publish_bundle(bundle, tmp_path / "repo", channel="slow")
    for _ in range(KEEP_VERSIONS + 2):
        last = publish_bundle(bundle, tmp_path / "repo")
    store = Repository(tmp_path / "repo", tmp_path / "repo-keys")
    kept = {int(n.split("/")[1]) for n in store.target_names() if n.count("/") == 2}
    assert kept == {1, *range(last.version - KEEP_VERSIONS + 1, last.version + 1)}
    assert len(list((tmp_path / "repo" / "metadata").glob("*.targets.json"))) == KEEP_VERSIONS


def test_expiries_and_their_renewal(tmp_path: Path) -> None:
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=200)
    publish_toy(tmp_path, now=long_ago)
    publish_toy(tmp_path, seed=1)
    metadata = tmp_path / "repo" / "metadata"
    days = {}
    for name in ("1.root", "2.root", "2.targets", "2.snapshot", "timestamp"):
        expires = Metadata.from_file(str(metadata / f"{name}.json")).signed.expires
        days[name] = round((expires - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400)
    assert days == {"1.root": 165, "2.root": 365, "2.targets": 90, "2.snapshot": 30, "timestamp": 30}


def test_lost_keys_say_what_to_do(tmp_path: Path) -> None:
    done = publish_toy(tmp_path)
    before = tables(tmp_path / "repo")
    (done.keys / "targets.pem").unlink()
    with pytest.raises(EnvironmentFault, match=r"(?s)targets\.pem.*missing.*backup"):
        publish_toy(tmp_path, seed=1)
    shutil.rmtree(done.keys)
    with pytest.raises(EnvironmentFault, match="missing"):
        publish_toy(tmp_path, seed=2)
    assert tables(tmp_path / "repo") == before


def test_foreign_readable_and_damaged_keys_are_refused(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    other = publish_bundle(toy_bundle(tmp_path / "x"), tmp_path / "other")
    with pytest.raises(InputError, match="is not the key"):
        publish_toy(tmp_path, seed=1, keys=other.keys)
    (other.keys / "root.pem").chmod(0o644)
    with pytest.raises(EnvironmentFault, match="readable by others"):
        publish_bundle(tmp_path / "x", tmp_path / "other")
    (other.keys / "root.pem").chmod(0o600)
    (other.keys / "root.pem").write_text("no key")
    with pytest.raises(IntegrityError, match="not a readable private key"):
        publish_bundle(tmp_path / "x", tmp_path / "other")


@pytest.mark.parametrize("place", ["repo", "repo/keys", "repo/targets/../keys"])
def test_keys_inside_the_served_folder_are_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match="served to devices"):
        publish_toy(tmp_path, keys=tmp_path / place)
    assert not (tmp_path / "repo").exists() or not list((tmp_path / "repo").rglob("*.json"))


def test_a_damaged_bundle_is_not_published(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "b")
    damage(bundle / "model.x86.onnx")
    with pytest.raises(IntegrityError, match="sha256"):
        publish_bundle(bundle, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.root.json"])
def test_damaged_metadata_stops_the_next_publication(tmp_path: Path, name: str) -> None:
    publish_toy(tmp_path)
    damage(tmp_path / "repo" / "metadata" / name, 60)
    with pytest.raises(IntegrityError):
        publish_toy(tmp_path, seed=1)


def test_an_interrupted_publication_is_overwritten_by_the_next(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    repo = tmp_path / "repo"
    committed = (repo / "metadata" / "timestamp.json").read_bytes()
    publish_toy(tmp_path, seed=1)
    (repo / "metadata" / "timestamp.json").write_bytes(committed)  # as if killed before the last write
    again = publish_toy(tmp_path, seed=2)
    assert again.version == 2
    store = Repository(repo, tmp_path / "repo-keys")
    data = store.read_target(names.index_target(TOY, "stable"))
    assert data is not None
    assert names.read_index(data, application=TOY, channel="stable").model_sha256 == f"{2:064x}"


def test_two_publications_at_once_are_refused(tmp_path: Path) -> None:
    store = Repository(tmp_path / "repo", tmp_path / "repo-keys")
    with store.locked(), pytest.raises(EnvironmentFault, match="another publication"):
        publish_toy(tmp_path)
    assert publish_toy(tmp_path, seed=1).version == 1
