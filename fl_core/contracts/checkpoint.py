"""Checkpoint: safetensors + JSON manifest in one folder. A pretrained model and a global model are the same type.

    manifest.json  model.safetensors  state/NAME.safetensors|NAME.json  report.json  report.html

One that central training keeps to go on from is in shards, one of each process: its arrays are read with any number of them.

    manifest.json  shards/rank-00000.safetensors ...

A run folder may hold many checkpoints and a symbolic link ``latest`` to the newest; both are accepted by name.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fl_core.contracts import arrays as array_format
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.manifests import MANIFEST_NAME, CheckpointManifest, read_manifest, to_json
from fl_core.contracts.shards import ShardReader
from fl_core.storage import atomic

MODEL_NAME = "model.safetensors"
LATEST = "latest"
STATE_HASHES = "state_sha256"
SHARDS = "shards"  # the folder, and the manifest's field: file -> sha256
MODEL_PREFIX = "model/"  # of the model's arrays in shards


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "numpy": np.__version__}


class Encoded(NamedTuple):
    """A model as safetensors, and its sha256."""

    data: bytes
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """``state`` holds what a resumed run needs beside the model (optimiser, aggregator, counters), by file name."""

    manifest: CheckpointManifest
    arrays: Arrays
    state: Mapping[str, bytes] = field(default_factory=dict)

    def encoded(self) -> Encoded:
        """The model as ``save`` will write it, for who needs its hash before."""
        data = array_format.to_bytes(self.arrays)
        return Encoded(data, atomic.sha256_bytes(data))

    def save(self, folder: Path, encoded: Encoded | None = None) -> CheckpointManifest:
        """Write atomically; returns the manifest with its hash, time and versions filled in.

        encoded: what ``encoded()`` of this checkpoint returned.
        """
        data, digest = encoded or self.encoded()
        manifest = completed(self.manifest, digest)
        with atomic.new_folder(folder) as temporary:
            (temporary / MODEL_NAME).write_bytes(data)
            for name, content in self.state.items():
                (temporary / "state").mkdir(exist_ok=True)
                (temporary / "state" / name).write_bytes(content)
            hashes = {name: atomic.sha256_bytes(content) for name, content in self.state.items()}
            table = {k: v for k, v in to_json(manifest).items() if k != STATE_HASHES}  # a parent's are not ours
            table |= {STATE_HASHES: hashes} if hashes else {}
            atomic.write_json(temporary / MANIFEST_NAME, table)
        return manifest


def completed(manifest: CheckpointManifest, digest: str) -> CheckpointManifest:
    """With the model's hash, the time and versions filled in."""
    return dataclasses.replace(
        manifest,
        model_sha256=digest,
        created=manifest.created or now(),
        versions={**versions(), **manifest.versions},
    )


def save_streamed(folder: Path, manifest: CheckpointManifest, parts: Iterable[bytes | memoryview]) -> None:
    """A checkpoint without state, atomically; its safetensors file comes in ``parts`` and is never whole in memory."""
    digest = hashlib.sha256()
    with atomic.new_folder(folder) as temporary:
        with (temporary / MODEL_NAME).open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
        atomic.write_json(temporary / MANIFEST_NAME, to_json(completed(manifest, digest.hexdigest())))


def write_shards_manifest(folder: Path, manifest: CheckpointManifest, digests: Mapping[str, str]) -> None:
    """What makes ``folder``, whose shards lie on the disk, a checkpoint. Its hash is that of its shards' hashes."""
    digest = atomic.sha256_bytes(json.dumps(dict(digests), sort_keys=True).encode())
    atomic.write_json(folder / MANIFEST_NAME, {**to_json(completed(manifest, digest)), SHARDS: dict(digests)})


def open_shards(folder: Path, manifest: CheckpointManifest) -> ShardReader:
    """Of a checkpoint in shards, not yet verified. Raises IntegrityError."""
    digests = manifest.unknown.get(SHARDS)
    if not isinstance(digests, dict) or not digests or not all(isinstance(d, str) for d in digests.values()):
        raise IntegrityError(f"{folder / MANIFEST_NAME}: names no shards", remedy="name a checkpoint of this release")
    return ShardReader(folder / SHARDS, digests)


def child_lineage(parent: Checkpoint | None) -> tuple[str, list[dict[str, Any]]]:
    """(parent_sha256, lineage) for a model made from ``parent``."""
    if parent is None:
        return "", []
    m = parent.manifest
    return m.model_sha256, [
        *m.lineage,
        {"stage": m.stage, "model_sha256": m.model_sha256, "step": m.step, "created": m.created},
    ]


def resolve(path: Path) -> Path:
    """A checkpoint folder, or a run folder whose ``latest`` names one. Raises InputError."""
    if (path / MANIFEST_NAME).is_file():
        return path
    if (path / LATEST / MANIFEST_NAME).is_file():
        return (path / LATEST).resolve()
    raise InputError(f"{path}: not a checkpoint", remedy=f"name a folder that holds {MANIFEST_NAME} and {MODEL_NAME}")


def load(path: Path, *, with_state: bool = False) -> Checkpoint:
    """Read and verify; of shards, the model alone. Raises InputError (no such checkpoint) or IntegrityError (a byte differs from the manifest)."""
    folder = resolve(path)
    manifest = read_manifest(CheckpointManifest, folder)
    if SHARDS in manifest.unknown:
        with open_shards(folder, manifest) as shards:
            shards.verify()
            return Checkpoint(
                manifest, {n.removeprefix(MODEL_PREFIX): shards.read(n) for n in shards.names(MODEL_PREFIX)}
            )
    model = folder / MODEL_NAME
    if not model.is_file():
        raise IntegrityError(f"{model}: no such file", remedy="the checkpoint is incomplete: copy it again")
    data = model.read_bytes()
    if atomic.sha256_bytes(data) != manifest.model_sha256:
        raise IntegrityError(
            f"{model}: its sha256 is not the one in {MANIFEST_NAME}",
            remedy="the file was changed or damaged: copy it again",
        )
    state: dict[str, bytes] = {}
    if with_state:
        hashes = manifest.unknown.get(STATE_HASHES, {})
        if not isinstance(hashes, dict):
            raise IntegrityError(f"{folder / MANIFEST_NAME}: field {STATE_HASHES!r} must be of type dict")
        for name, digest in hashes.items():
            file = folder / "state" / Path(name).name
            if not file.is_file() or atomic.sha256_file(file) != digest:
                raise IntegrityError(f"{file}: missing, or its sha256 is not the one in {MANIFEST_NAME}")
            state[name] = file.read_bytes()
    return Checkpoint(manifest, array_format.from_bytes(data, origin=str(model)), state)
