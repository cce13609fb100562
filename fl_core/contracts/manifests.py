"""Manifests of checkpoints and bundles: versioned JSON that keeps the fields it does not know.

A file of a newer minor format is read; a newer major format is refused. Unknown fields travel on unchanged, so
that an old device or server passes on what a newer one wrote.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fl_core.contracts.errors import IntegrityError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MANIFEST_LIMIT = 16 * 2**20

M = TypeVar("M", "CheckpointManifest", "BundleManifest")


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """``model_sha256`` is the identity of a model; ``lineage`` lists its ancestors, the oldest first."""

    application: str
    config: dict[str, Any]
    stage: str  # "pretrain" | "federation" | "simulation"
    model_sha256: str = ""
    parent_sha256: str = ""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0  # epochs of pretraining or rounds of a federation
    seed: int = 0
    created: str = ""  # RFC 3339, UTC
    clients_seen: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    unknown: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """A model for devices. ``targets`` maps an edge target to its model file and what was measured of it."""

    application: str
    config: dict[str, Any]
    version: int  # grows with each publication; devices never go back by themselves
    parent_sha256: str  # the checkpoint's model_sha256
    inputs: list[dict[str, Any]]  # name, dtype, shape (-1 = batch)
    outputs: list[dict[str, Any]]
    targets: dict[str, dict[str, Any]]  # file, sha256, bytes, precision, parity, latency_ms
    files: dict[str, dict[str, Any]]  # name -> sha256, bytes
    labels: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    clients_seen: list[str] = field(default_factory=list)
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    unknown: dict[str, Any] = field(default_factory=dict)


def to_json(manifest: CheckpointManifest | BundleManifest) -> dict[str, Any]:
    table = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest) if f.name != "unknown"}
    return {**manifest.unknown, **table}


def from_json(kind: type[M], table: Any, *, origin: str) -> M:
    """Raises IntegrityError naming ``origin`` and the field that is missing or of the wrong type."""
    if not isinstance(table, dict):
        raise IntegrityError(f"{origin}: a manifest must be a JSON object")
    version = table.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise IntegrityError(
            f"{origin}: format version {version!r} is not readable here",
            remedy=f"this release reads up to {FORMAT_VERSION}: upgrade",
        )
    kinds: dict[str, type] = {"str": str, "int": int, "dict": dict, "list": list}
    known: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        if f.name == "unknown":
            continue
        if f.name not in table:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise IntegrityError(f"{origin}: field {f.name!r} is missing")
            continue
        expected = kinds[str(f.type).split("[")[0]]
        if not isinstance(table[f.name], expected) or (expected is int and isinstance(table[f.name], bool)):
            raise IntegrityError(f"{origin}: field {f.name!r} must be of type {expected.__name__}")
        known[f.name] = table[f.name]
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**known, unknown={k: v for k, v in table.items() if k not in names})


def read_manifest(kind: type[M], folder: Path) -> M:
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise IntegrityError(f"{path}: larger than {MANIFEST_LIMIT:,} bytes")
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file", remedy="name a checkpoint or bundle folder") from None
    except OSError as error:
        raise IntegrityError(f"{path}: not readable: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not valid JSON: {error}") from None
    return from_json(kind, table, origin=str(path))
