"""Two slots for model bundles: one in use, the other for the next version or the former one.

    slots/A/  slots/B/  slots/current -> A|B  slots/state.json    in an application's own folder

The rules (``SlotState`` and the functions on it) do no I/O; ``Slots`` carries them out by rename, so that a crash at any
moment leaves ``current`` naming a whole bundle.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fl_core.contracts.bundle import GOLDEN_NAME, Bundle, open_bundle
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError, InputError, IntegrityError
from fl_core.contracts.manifests import BundleManifest, read_manifest
from fl_core.storage import atomic

NAMES = ("A", "B")
CURRENT = "current"
STATE_NAME = "state.json"
RECORD_NAME = "installed.json"
RECORD_LIMIT = 64 << 10
KEPT_REJECTIONS = 64
Decision = Literal["install", "up-to-date", "rejected", "downgrade"]


@dataclass(frozen=True)
class SlotState:
    """versions: of the bundles that lie in the slots. highest: ever installed. rejected: rolled back or failed here."""

    current: str | None = None
    versions: Mapping[str, int] = field(default_factory=dict)
    highest: int = 0
    rejected: frozenset[int] = frozenset()

    @property
    def version(self) -> int | None:
        return self.versions.get(self.current) if self.current else None


def decide(state: SlotState, offered: int) -> Decision:
    """What to do with the version that the channel offers. A device never goes back by itself."""
    if offered == state.version:
        return "up-to-date"
    if offered in state.rejected:
        return "rejected"
    if offered < max(state.highest, state.version or 0):
        return "downgrade"
    return "install"


def slot_for_next(state: SlotState) -> str:
    """The slot that is not in use."""
    return NAMES[1] if state.current == NAMES[0] else NAMES[0]


def installed(state: SlotState, version: int) -> SlotState:
    slot = slot_for_next(state)
    return SlotState(slot, {**state.versions, slot: version}, max(state.highest, version), state.rejected)


def rejected(state: SlotState, version: int) -> SlotState:
    """The newest rejections are kept; with ``highest`` they suffice, since versions only grow."""
    kept = sorted({*state.rejected, version})[-KEPT_REJECTIONS:]
    return SlotState(state.current, state.versions, state.highest, frozenset(kept))


def rolled_back(state: SlotState) -> SlotState:
    """The other slot in use, and the version that was in use rejected. Raises InputError where there is none."""
    other = slot_for_next(state)
    if state.current is None or other not in state.versions:
        raise InputError("there is no former model to roll back to", remedy="publish a newer version")
    back = SlotState(other, state.versions, state.highest, state.rejected)
    return rejected(back, state.version) if state.version is not None else back


class Slots:
    """The slots of one application, in its own folder ``home``."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "slots"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Changes are made one at a time, whichever process makes them; they take milliseconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def state(self) -> SlotState:
        """As the folder shows it; a damaged state file counts as none, since the slots themselves tell the versions."""
        versions = {}
        for name in NAMES:
            with contextlib.suppress(IntegrityError):
                versions[name] = read_manifest(BundleManifest, self.folder / name).version
        highest, kept = 0, frozenset[int]()
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            table = json.loads((self.folder / STATE_NAME).read_text(encoding="ascii"))
            highest, kept = int(table["highest"]), frozenset(int(v) for v in table["rejected"])
        current = self.current_slot()
        return SlotState(current if current in versions else None, versions, highest, kept)

    def current_slot(self) -> str | None:
        try:
            name = os.readlink(self.folder / CURRENT)
        except OSError:
            return None
        return name if name in NAMES else None

    def identity(self) -> tuple[str, int] | None:
        """Differs whenever another bundle is in use; cheap enough to ask before each run."""
        name = self.current_slot()
        try:
            return (name, (self.folder / name).stat().st_ino) if name else None
        except OSError:
            return None

    def install(self, staged: Path, version: int, target: str) -> SlotState:
        """Move the verified folder ``staged`` (same file system) into the free slot and switch to it."""
        with self.locked():
            before = self.state()
            after = installed(before, version)
            assert after.current is not None
            atomic.write_json(staged / RECORD_NAME, {"target": target, "version": version})
            sync_tree(staged)
            self._write(after)
            slot = self.folder / after.current
            discard(slot)
            os.replace(staged, slot)
            atomic.fsync_folder(self.folder)
            atomic.point_to(self.folder / CURRENT, after.current)
            return after

    def roll_back(self, failed: tuple[str, int] | None = None) -> SlotState:
        """Switch to the former bundle, which is verified first; the present version is not installed again.

        ``failed``: the identity of the bundle that failed; when another is in use by now, nothing is done.
        """
        with self.locked():
            if failed is not None and self.identity() != failed:
                return self.state()
            after = rolled_back(self.state())
            assert after.current is not None
            self.open(after.current)
            self._write(after)
            atomic.point_to(self.folder / CURRENT, after.current)
            return after

    def reject(self, version: int) -> None:
        with self.locked():
            self._write(rejected(self.state(), version))

    def open(self, slot: str) -> tuple[Bundle, str]:
        """(verified bundle, its edge target) of a slot. Raises IntegrityError naming the file that is damaged."""
        folder = self.folder / slot
        target = self._target(folder)
        manifest = read_manifest(BundleManifest, folder)
        if target not in manifest.targets:
            raise IntegrityError(f"{folder}: holds no model for edge target {target!r}")
        model = str(manifest.targets[target].get("file"))
        if model not in manifest.files or GOLDEN_NAME not in manifest.files:
            raise IntegrityError(f"{folder}: the manifest does not list the model and the golden samples")
        return open_bundle(folder, only=(model, GOLDEN_NAME)), target

    def open_current(self) -> tuple[Bundle, str] | None:
        """None before the first installation."""
        for attempt in (1, 2):
            slot = self.current_slot()
            if slot is None:
                return None
            try:
                return self.open(slot)
            except FieldfleetError:
                # Two updates may have come while we read; then another slot is in use now.
                if attempt == 2 or self.current_slot() == slot:
                    raise
        return None

    def facts(self) -> dict[str, Any] | None:
        """Of the bundle in use, from its manifest alone: nothing is verified. None where there is none to read."""
        slot = self.current_slot()
        if slot is None:
            return None
        with contextlib.suppress(IntegrityError):
            folder = self.folder / slot
            return model_facts(read_manifest(BundleManifest, folder), self._target(folder))
        return None

    def _target(self, folder: Path) -> str:
        path = folder / RECORD_NAME
        try:
            if path.stat().st_size > RECORD_LIMIT:
                raise IntegrityError(f"{path}: larger than {RECORD_LIMIT:,} bytes")
            return str(json.loads(path.read_text(encoding="utf-8"))["target"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path}: not readable: {error}", remedy="update again") from None

    def _write(self, state: SlotState) -> None:
        atomic.write_json(
            self.folder / STATE_NAME, {"highest": state.highest, "rejected": sorted(state.rejected)}, mode=0o644
        )


def model_facts(manifest: BundleManifest, target: str) -> dict[str, Any]:
    """What the device says of its model."""
    return {
        "application": manifest.application,
        "version": manifest.version,
        "parent_sha256": manifest.parent_sha256,
        "target": target,
        "precision": manifest.targets.get(target, {}).get("precision"),
    }


def sync_tree(folder: Path) -> None:
    """Onto the disk, before a rename makes it count."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    atomic.fsync_folder(folder)


def discard(folder: Path) -> None:
    """Rename first: a half-removed bundle must never stand under a slot's name."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def current_bundle(home: Path) -> Bundle | None:
    """The bundle in use, verified; None before the first installation. Raises IntegrityError."""
    found = Slots(home).open_current()
    return found[0] if found else None


def roll_back(home: Path) -> SlotState:
    """Raises InputError where there is no former model, IntegrityError where it is damaged."""
    if not (home / "slots").is_dir():
        raise EnvironmentFault(f"{home}: no model was ever installed here")
    return Slots(home).roll_back()
