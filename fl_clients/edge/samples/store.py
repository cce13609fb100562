"""The store: samples in, by callback or by file; frozen data sets out, in the application's own format."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from fl_clients.edge.samples.index import (
    Entry,
    Limits,
    SampleIndex,
    checked_id,
    content_name,
    is_store,
    prepare,
    stored_limits,
)
from fl_core.contracts.errors import DataError, EnvironmentFault, InputError
from fl_core.learning.application import Application
from fl_core.learning.examples import RawData
from fl_core.learning.samples import Sample, SampleFormat
from fl_core.storage import atomic

KEEP_SNAPSHOTS = 2
STRAY_S = 3_600.0  # a content file without an entry is younger than that while it is being added
MIN_FREE = 32 * 2**20
QUARANTINE_SHARE = 10


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A frozen data set, in the application's format in ``folder``; stays while it is open. ids: of the samples in it."""

    id: str
    folder: Path
    ids: tuple[str, ...]


class SampleStore:
    """Safe to use from several threads and processes: the agent's intake, trainings, and programs that add samples."""

    def __init__(self, folder: Path, application: Application, limits: Limits | None = None) -> None:
        if application.samples is None:
            raise InputError(f"{application.name} takes whole data sets only, not single samples")
        self.folder, self.application, self.limits = folder, application, limits or Limits()
        self.format: SampleFormat = application.samples
        prepare(folder)
        self.index = SampleIndex(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.index.close()

    # in

    def add(
        self, sample_id: str, arrays: Mapping[str, npt.NDArray[Any]], time: float | None = None, label: Any = None
    ) -> bool:
        """For programs on the device: on disk when it returns; False for the same sample again.

        Raises DataError for what is not in the application's format, EnvironmentFault on a full disk.
        """
        checked_id(sample_id)
        data = self.format.encode(arrays)
        temporary = self.folder / "content" / f".{secrets.token_hex(8)}{self.format.suffixes[0]}"
        atomic.write_bytes(temporary, data, mode=0o600)
        try:
            return self.add_file(sample_id, temporary, time, label)
        finally:
            temporary.unlink(missing_ok=True)

    def add_file(self, sample_id: str, file: Path, moment: float | None = None, label: Any = None) -> bool:
        """A content file in the application's format; ``file`` itself stays. As ``add``."""
        checked_id(sample_id)
        suffix = file.suffix.lower()
        if suffix not in self.format.suffixes:
            raise DataError(f"{file.name}: expected a file of {', '.join(self.format.suffixes)}")
        self._check_space(file)
        facts = self.format.check(file)
        value = None if label is None else self.format.label(label)
        entry = Entry(
            id=sample_id,
            file=content_name(sample_id, suffix),
            sha256=atomic.sha256_file(file),
            bytes=file.stat().st_size,
            time=time.time() if moment is None else float(moment),
            label=value,
            facts=facts,
        )
        placed = self._place(file, entry.file)
        try:
            new = self.index.add(entry)
        except BaseException:
            if placed:
                (self.folder / "content" / entry.file).unlink(missing_ok=True)
            raise
        self.expire()
        return new

    def label(self, sample_id: str, value: Any) -> str:
        """See SampleIndex.label. Raises DataError for what is no label of this application."""
        return self.index.label(sample_id, self.format.label(value))

    def quarantine(self, name: str, file: Path | None, reason: str) -> None:
        """Put a damaged file aside (it is moved), and count it."""
        target = f"{secrets.token_hex(4)}-{name[-100:]}" if file is not None else ""
        if file is not None:
            try:
                os.replace(file, self.folder / "quarantine" / target)
            except OSError:  # from another file system, or gone
                with contextlib.suppress(OSError):
                    shutil.copyfile(file, self.folder / "quarantine" / target)
                file.unlink(missing_ok=True)
        for old in self.index.quarantine(name, target, reason):
            if old:
                (self.folder / "quarantine" / old).unlink(missing_ok=True)
        self._bound_quarantine()

    def _bound_quarantine(self) -> None:
        """The oldest files go, over a tenth of the quota; what is noted of them stays."""
        files = []
        for path in (self.folder / "quarantine").iterdir():
            with contextlib.suppress(OSError):
                facts = path.lstat()
                files.append((facts.st_ctime_ns, facts.st_size, path))
        over = sum(size for _, size, _ in files) - self.limits.max_bytes // QUARANTINE_SHARE
        for _, size, path in sorted(files):
            if over <= 0:
                break
            path.unlink(missing_ok=True)
            over -= size

    def expire(self) -> int:
        """Apply the limits; returns how many samples went."""
        files = self.index.expire(self.limits)
        for file in files:
            (self.folder / "content" / file).unlink(missing_ok=True)
        return len(files)

    def sweep(self) -> None:
        """Remove what a crash left: content without an entry, half-made snapshots."""
        known, old = self.index.files(), time.time() - STRAY_S
        for file in (self.folder / "content").iterdir():
            with contextlib.suppress(OSError):
                if file.name not in known and file.stat().st_mtime < old and file.stat().st_ctime < old:
                    file.unlink()
        for path in (self.folder / "snapshots").glob(".*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime >= old:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                elif not (path.parent / path.name[1:].removesuffix(".lock")).exists():
                    path.unlink()

    def summary(self) -> dict[str, Any]:
        return self.index.summary()

    # out

    def version(self, config: Any, *, labelled: bool) -> str:
        """Changes exactly when a snapshot would."""
        return self._version(self._chosen(config, labelled), labelled)

    @contextlib.contextmanager
    def snapshot(self, config: Any, *, labelled: bool, client: str) -> Iterator[Snapshot]:
        """The samples of this moment, frozen while the block runs: others may come, be labelled or expire meanwhile.

        labelled: only those with a label that this configuration can learn from. Raises DataError where there are none.
        """
        for _ in range(10):
            entries = self._chosen(config, labelled)
            if not entries:
                what = "labelled samples" if labelled else "samples"
                raise DataError(f"{self.folder}: no {what} on this device yet")
            identity = self._version(entries, labelled)
            folder = self.folder / "snapshots" / f"{identity}-{client}"
            try:
                with self._lock(folder.name, fcntl.LOCK_SH):
                    with self._lock("making", fcntl.LOCK_EX):  # else a second maker would replace what the first reads
                        if not folder.is_dir():
                            self._write(entries, folder, client, config)
                    os.utime(folder)
                    self._prune(folder.name)
                    yield Snapshot(id=identity, folder=folder, ids=tuple(entry.id for entry in entries))
                return
            except _ContentGone:  # it expired between the look and the link: look again
                continue
        raise EnvironmentFault(f"{self.folder}: the samples change faster than they can be frozen")

    def _chosen(self, config: Any, labelled: bool) -> list[Entry]:
        entries = self.index.entries(labelled=labelled, since=time.time() - self.limits.max_age_s)
        if not labelled:  # labels, also those that nothing can be learned from, are not the model's business
            return [replace(entry, label=None) for entry in entries]
        return [entry for entry in entries if self.format.fits(self._sample(entry), config)]

    def _write(self, entries: list[Entry], folder: Path, client: str, config: Any) -> None:
        with atomic.new_folder(folder) as temporary:
            try:
                self.format.write([self._sample(entry) for entry in entries], temporary, client, config)
            except (OSError, DataError):
                if not self.index.files() >= {entry.file for entry in entries}:
                    raise _ContentGone from None
                raise

    def _prune(self, used: str) -> None:
        """The newest snapshots stay, and those that somebody has open."""
        root = self.folder / "snapshots"
        found = sorted((f for f in root.iterdir() if f.is_dir() and f.name[0] != "."), key=lambda f: -f.stat().st_mtime)
        for folder in found[KEEP_SNAPSHOTS:]:
            if folder.name == used:
                continue
            handle = os.open(root / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                aside = folder.with_name(f".{folder.name}.gone")
                os.replace(folder, aside)
                shutil.rmtree(aside)
            except OSError:
                pass
            finally:
                os.close(handle)

    @contextlib.contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        """A snapshot's lock is shared by all who read it."""
        handle = os.open(self.folder / "snapshots" / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)

    # inside

    def _version(self, entries: list[Entry], labelled: bool) -> str:
        rows = [[entry.id, entry.sha256, entry.label] for entry in entries]
        text = json.dumps([self.application.name, labelled, rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _sample(self, entry: Entry) -> Sample:
        return Sample(
            id=entry.id,
            path=self.folder / "content" / entry.file,
            time=entry.time,
            label=entry.label,
            facts=entry.facts,
        )

    def _place(self, file: Path, name: str) -> bool:
        """Content under its name, durably; False when it is there already."""
        target = self.folder / "content" / name
        if target.exists() and atomic.sha256_file(target) == atomic.sha256_file(file):
            return False
        if target.exists() and name in self.index.files():
            return False  # of another content: the index refuses it
        temporary = target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
        shutil.copyfile(file, temporary)  # never a link: whoever wrote the file may still hold it open
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        atomic.fsync_folder(target.parent)
        return True

    def _check_space(self, file: Path) -> None:
        size = file.stat().st_size
        if size > self.limits.max_bytes:
            raise DataError(f"{file.name}: {size:,} bytes are over the quota of {self.limits.max_bytes:,}")
        if shutil.disk_usage(self.folder).free < size + MIN_FREE:
            raise EnvironmentFault(f"{self.folder}: the disk is full", remedy="free space, or lower samples.max_mb")


class _ContentGone(Exception):
    pass


@contextlib.contextmanager
def open_data(app: Application, config: Any, folder: Path, *, labelled: bool, client: str) -> Iterator[RawData]:
    """A data set in ``folder``, or a snapshot of the samples where it is a store; readable while the block runs."""
    if not is_store(folder):
        yield app.read(folder)
        return
    with (
        SampleStore(folder, app, stored_limits(folder)) as store,
        store.snapshot(config, labelled=labelled, client=client) as snapshot,
    ):
        yield app.read(snapshot.folder)


def data_version(app: Application, config: Any, folder: Path) -> str:
    """Changes when the labelled samples of a store do; "" for a plain folder."""
    if not is_store(folder):
        return ""
    with SampleStore(folder, app, stored_limits(folder)) as store:
        return store.version(config, labelled=True)
