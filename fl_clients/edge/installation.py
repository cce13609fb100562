"""The work of one update, in the updater's own process: refresh, decide, fetch, verify, self-test, switch."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, RepositoryError
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]
from tuf.ngclient import Updater, UpdaterConfig  # type: ignore[attr-defined]

from fl_clients.edge.clock import ClockFloor, parse_time
from fl_clients.edge.fetcher import Fetcher, base_url, tls_context
from fl_clients.edge.slots import Slots, decide
from fl_core.contracts.bundle import GOLDEN_NAME, open_bundle
from fl_core.contracts.errors import (
    EnvironmentFault,
    FieldfleetError,
    GoalMissed,
    InputError,
    IntegrityError,
    RefusedError,
)
from fl_core.contracts.manifests import MANIFEST_NAME
from fl_core.delivery.names import INDEX_LIMIT, ChannelIndex, file_target, index_target, read_index
from fl_core.runtime.golden import golden_check
from fl_core.storage import atomic

ROOT_LIMIT = 512_000
MAX_BUNDLE_BYTES = 2 << 30
ATTEMPTS_NAME, ATTEMPTS = "attempts.json", 5
SPARE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """root: the first root metadata, which the operator gave; ca: of an https repository; deadline: monotonic."""

    home: Path
    application: str
    channel: str
    target: str
    repository: str
    root: Path
    ca: Path | None
    deadline: float


def run_update(request: Request) -> dict[str, Any]:
    """Raises a FieldfleetError for everything that is refused; the slot in use is then untouched."""
    work = request.home / "update"
    work.mkdir(parents=True, exist_ok=True)
    with only_one(work / ".lock"):
        floor = ClockFloor(work / "clock.json")
        floor.check(utc_now())
        with refusals(request.repository):
            fetcher = Fetcher(context_of(request), work / "partial", request.deadline)
            try:
                return Update(request, work, fetcher, floor).run()
            finally:
                fetcher.close()


class Update:
    def __init__(self, request: Request, work: Path, fetcher: Fetcher, floor: ClockFloor) -> None:
        self.request, self.work, self.fetcher, self.floor = request, work, fetcher, floor
        self.slots = Slots(request.home)
        self.staging = work / "staging"
        self.received = 0

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        client = self._client()
        client.refresh()
        index = self._index(client)
        self.floor.check(utc_now(), also=parse_time(index.published))
        self.floor.raise_to(utc_now())
        before = self.slots.state()
        decision = decide(before, index.version)
        facts: dict[str, Any] = {
            "application": index.application,
            "channel": index.channel,
            "previous": before.version,
            "repository": self._generation(),
        }
        if decision == "downgrade":
            raise IntegrityError(
                f"the channel offers version {index.version}, older than {max(before.highest, before.version or 0)}",
                remedy="publish the older model again: it then gets a new version",
            )
        if decision != "install":
            shutil.rmtree(self.staging, ignore_errors=True)
            return {"status": decision, "version": before.version, "offered": index.version, **facts}
        folder = self._fetch(client, index)
        report = self._verify(folder, index)
        self.slots.install(folder, index.version, self.request.target)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.fetcher.forget()
        return {
            "status": "installed",
            "version": index.version,
            "model_sha256": index.model_sha256,
            "bytes": self.received,
            "seconds": round(time.monotonic() - started, 3),
            "self_test": report,
            **facts,
        }

    def _generation(self) -> int | None:
        """Of the repository, as it was just verified: grows with each publication."""
        try:
            version = json.loads((self.work / "metadata" / "snapshot.json").read_bytes())["signed"]["version"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return version if type(version) is int else None

    def _client(self) -> Updater:
        metadata = self.work / "metadata"
        metadata.mkdir(exist_ok=True)
        base = base_url(self.request.repository)
        return Updater(
            str(metadata),
            f"{base}/metadata/",
            str(self.staging),
            f"{base}/targets/",
            fetcher=self.fetcher,
            config=UpdaterConfig(max_root_rotations=64, root_max_length=ROOT_LIMIT),
            bootstrap=read_root(self.request.root),
        )

    def _index(self, client: Updater) -> ChannelIndex:
        request = self.request
        facts = self._info(client, index_target(request.application, request.channel))
        if facts.length > INDEX_LIMIT:
            raise IntegrityError(f"{facts.path}: {facts.length:,} bytes, over the limit of {INDEX_LIMIT:,}")
        self.staging.mkdir(parents=True, exist_ok=True)
        path = Path(self._download(client, facts, self.staging / "index.json"))
        index = read_index(path.read_bytes(), application=request.application, channel=request.channel)
        path.unlink()
        return index

    def _fetch(self, client: Updater, index: ChannelIndex) -> Path:
        """Into ``staging/VERSION``; files of an interrupted attempt count when they verify."""
        folder = self.staging / str(index.version)
        for other in self.staging.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        names = index.files_for(self.request.target)
        infos = {name: self._info(client, file_target(index.application, index.version, name)) for name in names}
        for name, info in infos.items():
            stated = index.files[name]
            if info.length != stated["bytes"] or info.hashes.get("sha256") != stated["sha256"]:
                raise IntegrityError(f"{info.path}: the signed index and the signed targets differ")
        self._check_space(sum(info.length for info in infos.values()))
        for name, info in infos.items():
            if client.find_cached_target(info, str(folder / name)) is None:
                self._download(client, info, folder / name)
        for stray in folder.iterdir():
            if stray.name not in infos:
                stray.unlink()
        return folder

    def _verify(self, folder: Path, index: ChannelIndex) -> dict[str, Any]:
        """The device's own check of the whole, beyond the signatures of its parts."""
        model = index.targets[self.request.target]
        bundle = open_bundle(folder, only=(model, GOLDEN_NAME))
        manifest = bundle.manifest
        stated = (manifest.application, manifest.version, manifest.targets.get(self.request.target, {}).get("file"))
        if stated != (index.application, index.version, model) or not {model, GOLDEN_NAME} <= set(manifest.files):
            raise IntegrityError(f"{folder / MANIFEST_NAME}: is not the manifest of version {index.version}")
        try:
            self._count_attempt(index.version)
            report = golden_check(bundle, self.request.target).to_json()
        except (GoalMissed, IntegrityError):
            self.slots.reject(index.version)
            shutil.rmtree(self.staging, ignore_errors=True)
            raise
        (self.work / ATTEMPTS_NAME).unlink(missing_ok=True)
        return report

    def _count_attempt(self, version: int) -> None:
        """A model whose self-test ends this process, for its memory say, is not tried for ever. Raises GoalMissed."""
        path = self.work / ATTEMPTS_NAME
        try:
            table = json.loads(path.read_bytes())
            count = int(table["count"]) if table["version"] == version else 0
        except (OSError, ValueError, KeyError, TypeError):
            count = 0
        if count >= ATTEMPTS:
            raise GoalMissed(
                f"the self-test of version {version} ended its process {count} times",
                remedy="is the model too large for this device? publish another version",
            )
        atomic.write_json(path, {"version": version, "count": count + 1})

    def _info(self, client: Updater, name: str) -> TargetFile:
        found = client.get_targetinfo(name)
        if found is None:
            raise RefusedError(
                f"{self.request.repository}: offers no {name}",
                remedy="publish a bundle of this application to this channel, or correct the device's channel",
            )
        return found

    def _download(self, client: Updater, info: TargetFile, path: Path) -> str:
        try:
            done = str(client.download_target(info, str(path)))
        except (RepositoryError, DownloadLengthMismatchError):
            self.fetcher.forget()  # what was wrong once must not be the start of the next attempt
            raise
        self.received += info.length
        return done

    def _check_space(self, needed: int) -> None:
        if needed > MAX_BUNDLE_BYTES:
            raise IntegrityError(f"the bundle has {needed:,} bytes, over the limit of {MAX_BUNDLE_BYTES:,}")
        free = shutil.disk_usage(self.work).free
        if free < 2 * needed + SPARE_BYTES:
            raise EnvironmentFault(
                f"{self.work}: {free:,} bytes free, {2 * needed + SPARE_BYTES:,} are needed", remedy="make room"
            )


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Raises EnvironmentFault while another update of this home runs; the lock ends with the process."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentFault(f"{path.parent}: another update is running", remedy="wait until it ends") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def refusals(repository: str) -> Iterator[None]:
    """The TUF client's exceptions in the words of the house."""
    try:
        yield
    except FieldfleetError:
        raise
    except DownloadLengthMismatchError as error:
        raise IntegrityError(f"{repository}: sends more than was signed: {error}") from None
    except DownloadHTTPError as error:
        raise RefusedError(f"{repository}: {error}", remedy="is this the address of a repository?") from None
    except DownloadError as error:
        reason = error.__cause__ or error
        raise RefusedError(
            f"{repository}: cannot be reached: {reason}", remedy="the update is tried again later"
        ) from None
    except RepositoryError as error:
        raise IntegrityError(
            f"{repository}: refused: {type(error).__name__}: {error}",
            remedy="the model in use stays; publish again, and check who can write to the repository",
        ) from None


def context_of(request: Request) -> Any:
    return tls_context(request.ca) if request.repository.startswith("https://") else None


def read_root(path: Path) -> bytes:
    """Raises InputError or IntegrityError naming the file."""
    try:
        if path.stat().st_size > ROOT_LIMIT:
            raise IntegrityError(f"{path}: larger than {ROOT_LIMIT:,} bytes, so no root metadata")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: no readable root metadata: {error.strerror}",
            remedy="copy the repository's metadata/1.root.json here",
        ) from None


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
