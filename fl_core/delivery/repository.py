"""Writing a signed repository that any TUF client can read (python-tuf; https://theupdateframework.github.io/specification/).

    DIR/metadata/N.root.json N.targets.json N.snapshot.json timestamp.json      DIR/targets/APPLICATION/VERSION/HASH.FILE

``timestamp.json`` commits a publication: everything else is written before it under a name of its own, so that an
interrupted publication leaves the former one readable, and the next one overwrites what never counted.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.delivery.keys import check_place, create_keys, load_keys
from fl_core.storage import atomic

EXPIRY_DAYS = {"root": 365, "targets": 90, "snapshot": 30, "timestamp": 30}
ROOT_RENEWAL_DAYS = 180
KEEP_VERSIONS = 8
METADATA_LIMIT = 5_000_000
Signed = TypeVar("Signed", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class State:
    """What the newest committed timestamp stands for."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


class Repository:
    """A repository folder and its keys. ``now`` is the time of signing (UTC), the current time where it is None."""

    def __init__(self, folder: Path, keys: Path, *, now: datetime.datetime | None = None) -> None:
        self.folder, self.keys = folder, keys
        self.metadata, self.targets = folder / "metadata", folder / "targets"
        self.now = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
        check_place(keys, folder)

    @property
    def root_file(self) -> Path:
        """What the operator hands to devices: their trust starts here."""
        return self.metadata / "1.root.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One publication at a time. Raises EnvironmentFault while another runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EnvironmentFault(
                    f"{self.folder}: another publication is running", remedy="wait until it ends"
                ) from None
            yield

    def load(self) -> State | None:
        """The committed state; None in a new repository. Raises IntegrityError naming the file that is damaged."""
        if not (self.metadata / "timestamp.json").is_file():
            return None
        timestamp = self._read("timestamp.json", Timestamp)
        snapshot = self._read(f"{timestamp.signed.snapshot_meta.version}.snapshot.json", Snapshot)
        targets = self._read(f"{snapshot.signed.meta['targets.json'].version}.targets.json", Targets)
        newest = max((int(p.name.split(".")[0]) for p in self.metadata.glob("*.root.json")), default=0)
        root = self._read(f"{newest}.root.json", Root)
        roles: dict[str, Metadata[Any]] = {
            "root": root,
            "targets": targets,
            "snapshot": snapshot,
            "timestamp": timestamp,
        }
        for role, metadata in roles.items():
            try:
                root.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
            except RepositoryError:
                raise IntegrityError(
                    f"{self.metadata}: the {role} metadata is not signed by the repository's key",
                    remedy="restore the repository from its backup",
                ) from None
        return State(root, targets, snapshot, timestamp)

    def signers(self) -> dict[str, CryptoSigner]:
        """The keys; made where neither they nor a repository exist. Raises EnvironmentFault when they are lost."""
        if not self.keys.exists() and not any(self.metadata.glob("*.root.json")):
            return create_keys(self.keys)
        return load_keys(self.keys)

    def commit(self, new: Mapping[str, bytes], drop: set[str]) -> int:
        """Add or replace the targets ``new``, drop ``drop``, sign everything; returns the timestamp's version.

        Call it inside ``locked``. Target files are written first, the timestamp last.
        """
        state = self.load()
        signers = self.signers()
        root = self._root(state, signers)
        targets = state.targets if state else Metadata(Targets())
        before = dict(targets.signed.targets)
        for name, data in new.items():
            facts = TargetFile.from_data(name, data, ["sha256"])
            targets.signed.targets[name] = facts
            atomic.write_bytes(self._target_path(name, facts), data)
        for name in drop - set(new):
            targets.signed.targets.pop(name, None)
        snapshot = state.snapshot if state else Metadata(Snapshot())
        timestamp = state.timestamp if state else Metadata(Timestamp())
        if state:
            for metadata in (targets, snapshot, timestamp):
                metadata.signed.version += 1
        snapshot.signed.meta["targets.json"] = MetaFile(targets.signed.version)
        timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
        if state is None or not (self.metadata / f"{root.signed.version}.root.json").is_file():
            self._sign(root, signers["root"], f"{root.signed.version}.root.json", renew=False)
        self._sign(targets, signers["targets"], f"{targets.signed.version}.targets.json")
        self._sign(snapshot, signers["snapshot"], f"{snapshot.signed.version}.snapshot.json")
        self._sign(timestamp, signers["timestamp"], "timestamp.json")
        self._prune([*before.items(), *targets.signed.targets.items()], targets.signed.version, snapshot.signed.version)
        return int(timestamp.signed.version)

    def target_names(self) -> list[str]:
        state = self.load()
        return sorted(state.targets.signed.targets) if state else []

    def read_target(self, name: str) -> bytes | None:
        """A target's verified bytes; None where the repository has no such target."""
        state = self.load()
        facts = state.targets.signed.targets.get(name) if state else None
        if facts is None:
            return None
        path = self._target_path(name, facts)
        try:
            data = path.read_bytes()
            facts.verify_length_and_hashes(data)
        except (OSError, RepositoryError) as error:
            raise IntegrityError(f"{path}: {error}", remedy="restore the repository from its backup") from None
        return data

    def _root(self, state: State | None, signers: Mapping[str, CryptoSigner]) -> Metadata[Root]:
        """The newest root, renewed in good time before it expires; a new one in a new repository."""
        if state is None:
            signed = Root(version=1, consistent_snapshot=True, expires=self._expiry("root"))
            for role, signer in signers.items():
                signed.add_key(signer.public_key, role)
            return Metadata(signed)
        root = state.root
        for role, signer in signers.items():
            if signer.public_key.keyid not in root.signed.roles[role].keyids:
                raise InputError(
                    f"{self.keys}/{role}.pem: is not the key that {self.folder} is signed with",
                    remedy="name the repository's own key folder with --keys",
                )
        if root.signed.expires - self.now < datetime.timedelta(days=ROOT_RENEWAL_DAYS):
            root.signed.version += 1
            root.signed.expires = self._expiry("root")
        return root

    def _expiry(self, role: str) -> datetime.datetime:
        return self.now + datetime.timedelta(days=EXPIRY_DAYS[role])

    def _sign(self, metadata: Metadata[Any], signer: CryptoSigner, name: str, *, renew: bool = True) -> None:
        if renew:
            metadata.signed.expires = self._expiry(metadata.signed.type)
        metadata.sign(signer)
        atomic.write_bytes(self.metadata / name, metadata.to_bytes(JSONSerializer(compact=True)))

    def _target_path(self, name: str, facts: TargetFile) -> Path:
        folder, _, file = name.rpartition("/")
        return self.targets / folder / f"{facts.hashes['sha256']}.{file}"

    def _read(self, name: str, kind: type[Signed]) -> Metadata[Signed]:
        path = self.metadata / name
        try:
            if path.stat().st_size > METADATA_LIMIT:
                raise IntegrityError(f"{path}: larger than {METADATA_LIMIT:,} bytes")
            metadata: Metadata[Signed] = Metadata.from_bytes(path.read_bytes())
        except (OSError, DeserializationError) as error:
            raise IntegrityError(
                f"{path}: not readable metadata: {error}", remedy="restore the repository from its backup"
            ) from None
        if not isinstance(metadata.signed, kind):
            raise IntegrityError(f"{path}: holds the metadata of another role")
        return metadata

    def _prune(self, named: list[tuple[str, TargetFile]], targets_version: int, snapshot_version: int) -> None:
        """Remove target files that neither this nor the last publication names, and metadata long superseded."""
        keep = {self._target_path(name, facts) for name, facts in named}
        for path in self.targets.rglob("*"):
            if path.is_file() and path not in keep:
                path.unlink()
        for path in sorted(self.targets.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
        newest = {"targets": targets_version, "snapshot": snapshot_version}
        for role, version in newest.items():
            for path in self.metadata.glob(f"*.{role}.json"):
                number = path.name.split(".")[0]
                if number.isdigit() and int(number) <= version - KEEP_VERSIONS:
                    path.unlink()
