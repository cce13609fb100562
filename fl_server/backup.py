"""Backup of a server's home while the server runs, and its restoration.

Databases are copied by SQLite's online backup, each a consistent snapshot; checkpoint folders appear whole or not at
all, so that a copy of one is whole too. The order makes the parts fit: messages first, checkpoints next, the registry
last. A round that was saved in between is found done; one that was not is asked again; a revocation is never older than
what it concerns. Everything is opened, verified and hashed before the backup gets its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.contracts.manifests import MANIFEST_NAME
from fl_core.storage import atomic
from fl_server.home import ServerHome

MANIFEST = "backup.json"
FORMAT = 1
FIRST, LAST = "state.db", "registry.db"
LEFT_OUT = (".lock", "control.sock")
TRIES = 10


@dataclass(frozen=True)
class Backup:
    """outside: folders of ``server run`` that lie outside the home and are not in it."""

    path: Path
    created: str
    fleet: str
    files: int
    bytes: int
    outside: tuple[str, ...] = ()


def create(home: ServerHome, target: Path) -> Backup:
    """Make ``target`` (which must not exist). Raises InputError, IntegrityError (a damaged store), EnvironmentFault."""
    if target.exists():
        raise InputError(f"{target}: exists", remedy="name a new folder")
    if target.resolve().is_relative_to(home.path.resolve()):
        raise InputError(f"{target}: lies inside the home", remedy="name a folder elsewhere, best on another disk")
    try:
        with atomic.new_folder(target) as folder:
            folder.chmod(0o700)
            databases = sorted(home.path.glob("*.db"), key=lambda p: (p.name == LAST, p.name != FIRST, p.name))
            for database in databases[:1]:
                _copy_database(database, folder)
            for entry in sorted(home.path.iterdir()):
                if entry.is_dir() and not entry.name.startswith("."):
                    _copy_folder(entry, folder / entry.name)
                elif _plain(entry):
                    shutil.copy2(entry, folder / entry.name)
            for database in databases[1:]:
                _copy_database(database, folder)
            _settle_links(folder)
            _check_content(folder)
            created, outside = checkpoints.now(), _outside(folder)
            files = dict(_hashed(folder))
            manifest = {
                "format": FORMAT,
                "created": created,
                "fleet": home.settings.fleet,
                "files": files,
                "outside": list(outside),
            }
            atomic.write_json(folder / MANIFEST, manifest, mode=0o600)
            size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
    except OSError as error:
        raise EnvironmentFault(f"{target}: {error.strerror or error}", remedy="is there room on that disk?") from None
    return Backup(target, created, home.settings.fleet, len(files), size, outside)


def restore(source: Path, target: Path) -> Backup:
    """Make the home ``target`` from a backup, after every byte of it was checked. Raises InputError, IntegrityError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not empty", remedy="name a new folder, or move the old home away")
    manifest = _manifest(source)
    files: dict[str, str] = manifest["files"]
    found = dict(_hashed(source))
    for name in sorted(files.keys() | found.keys()):
        if files.get(name) != found.get(name):
            what = (
                "is missing" if name not in found else "does not belong to it" if name not in files else "was changed"
            )
            raise IntegrityError(f"{source}: {name} {what}", remedy="use another backup")
    with atomic.new_folder(target) as folder:
        shutil.copytree(source, folder, symlinks=True, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        folder.chmod(0o700)
        _check_content(folder)
    size = sum(p.lstat().st_size for p in target.rglob("*") if p.is_file())
    return Backup(target, manifest["created"], manifest["fleet"], len(files), size, tuple(manifest["outside"]))


def _plain(entry: Path) -> bool:
    if entry.name in LEFT_OUT or entry.name.startswith(".") or not stat.S_ISREG(entry.lstat().st_mode):
        return False
    return not entry.name.endswith((".db", ".db-wal", ".db-shm"))


def _copy_database(database: Path, folder: Path) -> None:
    copy = folder / database.name
    try:
        with (
            contextlib.closing(sqlite3.connect(database, timeout=60)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")  # one file without its log; the server makes it WAL again
    except sqlite3.Error as error:
        raise IntegrityError(f"{database}: cannot be copied: {error}") from None
    copy.chmod(0o600)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy what is there. Old rounds are removed while this goes on: what vanishes is left out, what appears is taken."""
    for _ in range(TRIES):
        shutil.rmtree(target, ignore_errors=True)
        try:
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(".*.tmp", ".*.old-*"))
            return
        except shutil.Error as error:
            if not all("No such file" in str(reason) for _, _, reason in error.args[0]):
                raise
        except FileNotFoundError:
            continue
    raise EnvironmentFault(f"{source}: changes faster than it can be copied", remedy="try again")


def _settle_links(folder: Path) -> None:
    """``latest`` may have been read before its checkpoint was written, or after an older one was removed."""
    for link in folder.rglob(checkpoints.LATEST):
        if link.is_symlink():
            rounds = sorted(p.name for p in link.parent.glob("round-*") if p.is_dir())
            final = ["final"] if (link.parent / "final").is_dir() else []
            newest = [*rounds, *final][-1:]
            link.unlink()
            if newest:
                link.symlink_to(newest[0])


def _check_content(folder: Path) -> None:
    """Open everything that has a format of its own."""
    ServerHome(folder)
    for database in folder.glob("*.db"):
        with contextlib.closing(sqlite3.connect(database)) as opened:
            try:
                answer = opened.execute("PRAGMA integrity_check").fetchone()[0]
            except sqlite3.Error as error:
                answer = str(error)
        if answer != "ok":
            raise IntegrityError(f"{database.name} is damaged: {answer}")
    for manifest in folder.glob(f"runs/*/*/{MANIFEST_NAME}"):
        if not manifest.parent.is_symlink():
            checkpoints.load(manifest.parent, with_state=True)


def _hashed(folder: Path) -> Iterator[tuple[str, str]]:
    """relative path -> sha256, or "-> NAME" for a link to a sibling. Raises IntegrityError for other kinds of files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            to = os.readlink(path)
            if "/" in to or to in ("..", "."):
                raise IntegrityError(f"{name}: is a link to {to}, outside its folder")
            yield name, f"-> {to}"
        elif path.is_file():
            if name != MANIFEST:
                yield name, atomic.sha256_file(path)
        elif not path.is_dir():
            raise IntegrityError(f"{name}: is neither a file nor a folder")


def _manifest(source: Path) -> dict[str, Any]:
    file = source / MANIFEST
    if not file.is_file():
        raise InputError(f"{source}: not a backup (no {MANIFEST})", remedy="made by 'fieldfleet server backup'")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        good = table["format"] == FORMAT and all(isinstance(table[k], str) for k in ("created", "fleet"))
        good = good and isinstance(table["outside"], list)
        for name, value in table["files"].items():
            good = good and isinstance(value, str) and ".." not in PurePosixPath(name).parts
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        good = False
    if not good:
        raise IntegrityError(f"{file}: not readable as a backup's manifest of format {FORMAT}")
    return dict(table)


def _outside(folder: Path) -> tuple[str, ...]:
    with contextlib.closing(sqlite3.connect(folder / LAST)) as database:
        rows = database.execute("SELECT spec FROM runs").fetchall()
    outs = [str(json.loads(spec)["out"]) for (spec,) in rows]
    return tuple(sorted(out for out in outs if Path(out).is_absolute()))
