"""Publishing a bundle: number it, name its files as targets, point a channel's index at it, sign."""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from fl_core.contracts.bundle import SUMS_NAME, Bundle, open_bundle
from fl_core.contracts.errors import InputError
from fl_core.contracts.manifests import MANIFEST_NAME, BundleManifest, to_json
from fl_core.delivery import names
from fl_core.delivery.keys import default_keys
from fl_core.delivery.repository import KEEP_VERSIONS, Repository
from fl_core.storage import atomic


@dataclass(frozen=True, kw_only=True)
class Publication:
    """``root``: the file that the operator hands to devices."""

    application: str
    channel: str
    version: int
    repository: Path
    keys: Path
    root: Path
    timestamp_version: int
    files: tuple[str, ...]
    bytes: int


def publish_bundle(
    bundle: Path,
    repository: Path,
    *,
    keys: Path | None = None,
    channel: str = names.DEFAULT_CHANNEL,
    now: datetime.datetime | None = None,
) -> Publication:
    """Publish under the next version of the bundle's application. The first publication makes keys and root.

    Raises IntegrityError (the bundle or the repository is damaged), EnvironmentFault (the keys are lost),
    InputError (wrong names or keys); the repository then still offers what it offered before.
    """
    opened = open_bundle(bundle)
    application = names.checked_application(opened.manifest.application)
    names.checked_channel(channel)
    if not opened.manifest.targets:
        raise InputError(f"{bundle}: the bundle holds no model")
    place = keys or default_keys(repository)
    store = Repository(repository, place, now=now)
    with store.locked():
        present = store.target_names()
        versions = published_versions(present, application)
        version = max(versions, default=opened.manifest.version) + 1
        index = names.index_target(application, channel)
        files = numbered_files(opened, version)
        content = channel_index(opened, files, channel, version, store.now)
        new = {names.file_target(application, version, name): data for name, data in files.items()}
        offered = {_offered(store, name) for name in present if _is_index(name, application) and name != index}
        keep = set(sorted({*versions, version})[-KEEP_VERSIONS:]) | offered
        drop = {
            name for name in present if not _is_index(name, application) and _version(name, application) not in keep
        }
        drop = {name for name in drop if name.startswith(f"{application}/")}
        timestamp = store.commit({**new, index: content.to_bytes()}, drop)
    return Publication(
        application=application,
        channel=channel,
        version=version,
        repository=repository,
        keys=place,
        root=store.root_file,
        timestamp_version=timestamp,
        files=tuple(sorted(files)),
        bytes=sum(map(len, files.values())),
    )


def numbered_files(bundle: Bundle, version: int) -> dict[str, bytes]:
    """The bundle's files with ``version`` in the manifest, and SHA256SUMS to match."""
    manifest: BundleManifest = dataclasses.replace(bundle.manifest, version=version)
    files = {name: (bundle.folder / names.checked_file(name)).read_bytes() for name in manifest.files}
    table = json.dumps(to_json(manifest), indent=2, sort_keys=True, allow_nan=False) + "\n"
    files[MANIFEST_NAME] = table.encode()
    sums = "".join(f"{atomic.sha256_bytes(data)}  {name}\n" for name, data in sorted(files.items()))
    return {**files, SUMS_NAME: sums.encode()}


def channel_index(
    bundle: Bundle, files: dict[str, bytes], channel: str, version: int, now: datetime.datetime
) -> names.ChannelIndex:
    return names.ChannelIndex(
        application=bundle.manifest.application,
        channel=channel,
        version=version,
        published=now.isoformat(timespec="seconds"),
        model_sha256=bundle.manifest.parent_sha256,
        files={n: {"sha256": atomic.sha256_bytes(d), "bytes": len(d)} for n, d in sorted(files.items())},
        targets={name: Path(facts["file"]).name for name, facts in bundle.manifest.targets.items()},
    )


def published_versions(targets: list[str], application: str) -> set[int]:
    return {v for name in targets if (v := _version(name, application)) is not None}


def _version(target: str, application: str) -> int | None:
    """Of ``APPLICATION/VERSION/FILE``; None for anything else."""
    owner, _, rest = target.partition("/")
    number, slash, _ = rest.partition("/")
    return int(number) if owner == application and slash and number.isdigit() else None


def _is_index(target: str, application: str) -> bool:
    return target.startswith(f"{application}/") and target.count("/") == 1


def _offered(store: Repository, index: str) -> int:
    """The version that another channel still points at."""
    application, _, file = index.partition("/")
    data = store.read_target(index) or b""
    return names.read_index(data, application=application, channel=file.removesuffix(".json")).version
