"""Bundle: what a device receives. ``manifest.json model.TARGET.onnx golden.npz card.md SHA256SUMS`` in one folder.

Opening a bundle verifies every file against the manifest. Golden samples are inputs with the outputs that each
target produced at export; a device runs them before it trusts the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.manifests import MANIFEST_NAME, BundleManifest, read_manifest
from fl_core.storage import atomic

GOLDEN_NAME = "golden.npz"
CARD_NAME = "card.md"
SUMS_NAME = "SHA256SUMS"


@dataclass(frozen=True)
class Bundle:
    folder: Path
    manifest: BundleManifest

    def model_file(self, target: str) -> Path:
        """The ONNX file of an edge target. Raises InputError with the list of targets in this bundle."""
        if target not in self.manifest.targets:
            raise InputError(
                f"{self.folder}: no model for edge target {target!r}",
                remedy=f"it holds: {', '.join(self.manifest.targets)}",
            )
        return self.folder / Path(self.manifest.targets[target]["file"]).name


def is_bundle(path: Path) -> bool:
    """A bundle rather than a checkpoint: its manifest names edge targets."""
    try:
        read_manifest(BundleManifest, path)
    except IntegrityError:
        return False
    return True


def open_bundle(folder: Path, *, only: tuple[str, ...] | None = None) -> Bundle:
    """Verify and open. ``only`` limits the files that must be there (a device holds one target's model).

    Raises IntegrityError naming the file whose size or sha256 differs.
    """
    manifest = read_manifest(BundleManifest, folder)
    for target, facts in manifest.targets.items():  # else a model would be run that no hash vouches for
        if not isinstance(facts, dict) or facts.get("file") not in manifest.files:
            raise IntegrityError(f"{folder}: the model file of edge target {target!r} is not among the bundle's files")
    for name, facts in manifest.files.items():
        if Path(name).name != name or not isinstance(facts, dict):
            raise IntegrityError(f"{folder}: {name!r} is not a plain file name with its facts")
        if only is not None and name not in only:
            continue
        file = folder / name
        if not file.is_file():
            raise IntegrityError(f"{file}: no such file", remedy="the bundle is incomplete: fetch it again")
        if file.stat().st_size != facts.get("bytes") or atomic.sha256_file(file) != facts.get("sha256"):
            raise IntegrityError(
                f"{file}: its size or sha256 is not the one in {MANIFEST_NAME}", remedy="fetch it again"
            )
    return Bundle(folder, manifest)
