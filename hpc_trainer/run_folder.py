"""A training run's folder: checkpoints by (epoch, step), the newest to go on from, and the final model.

    epoch-00004/                the end of epoch 4: a shard of each process, and the manifest
    epoch-00004-step-00120/     120 steps into epoch 5
    final/  latest -> final     history.jsonl

Each process copies its part of the state and goes on training, while a thread of its own writes the shard into a hidden folder.
Whether everybody's lies on the disk is asked with the sums of the next step, which are summed anyway; then the main process writes
the manifest and renames the folder. Before that nothing takes it for a checkpoint; a start removes what was left half-written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import MODEL_PREFIX, SHARDS, Checkpoint
from fl_core.contracts.config import describes, to_table
from fl_core.contracts.errors import ConfigError, IntegrityError
from fl_core.contracts.manifests import MANIFEST_NAME, CheckpointManifest, read_manifest
from fl_core.contracts.shards import Piece, ShardReader, shard_parts
from fl_core.learning.application import Application
from fl_core.storage import atomic
from hpc_trainer.processes import Processes

PROGRESS = "progress"
PARTIAL = ".partial"
KEPT = 2
# Keys of [pretrain] that decide where and how fast the same training runs; a run may go on with others.
FREE = (
    *("parallel", "mesh", "spatial_axis", "schedule_of_stages", "micro_batch", "activation_checkpointing", "compile"),
    *("checkpoint_every", "checkpoint_steps", "prefetch"),
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """epoch: whole epochs done; step: steps done in the next one, with its losses' sums so far."""

    epoch: int
    step: int = 0
    numerator: float = 0.0
    denominator: float = 0.0

    def after_step(self, sums: Tensor) -> Progress:
        return replace(
            self,
            step=self.step + 1,
            numerator=self.numerator + float(sums[0]),
            denominator=self.denominator + float(sums[1]),
        )

    @property
    def name(self) -> str:
        return f"epoch-{self.epoch:05d}" + (f"-step-{self.step:05d}" if self.step else "")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to go on from; who reads it closes ``shards``."""

    progress: Progress
    shards: ShardReader


@dataclass(kw_only=True)
class _Writing:
    """A checkpoint of which this process's shard is being written, or was."""

    name: str
    manifest: CheckpointManifest
    shard: Future[None]


class RunFolder:
    """Every process has one, and makes the same calls in the same order: most of them are collective."""

    def __init__(
        self,
        path: Path,
        application: Application,
        config: Any,
        clients: tuple[str, ...],
        seed: int,
        processes: Processes,
        start: Checkpoint | None = None,
    ) -> None:
        self.path, self.processes = path, processes
        self.parent_sha256, self.lineage = checkpoints.child_lineage(start)
        seen = start.manifest.clients_seen if start else []
        self.application, self.config, self.seed = application, config, seed
        self.clients = sorted({*seen, *clients})
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None
        self._committing: Future[None] | None = None
        if processes.is_main:
            for left in path.glob(f".*{PARTIAL}"):
                shutil.rmtree(left)
        processes.barrier()

    def save(self, progress: Progress, pieces: Sequence[Piece], metrics: dict[str, float]) -> None:
        """Returns once an earlier checkpoint lies there and this one is under way. ``pieces`` are copies: this process's."""
        self.settle()
        facts = np.array([progress.epoch, progress.step, progress.numerator, progress.denominator])
        if self.processes.is_main:
            pieces = [*pieces, Piece(name=PROGRESS, shape=facts.shape, offset=(0,), array=facts)]
        self._writing = _Writing(
            name=progress.name,
            manifest=self._manifest(progress.epoch, metrics),
            shard=self._thread.submit(self._write, progress.name, pieces),
        )

    @property
    def writing(self) -> bool:
        """Whether this process still writes its shard. Raises the error with which it could not."""
        if self._writing is None or not self._writing.shard.done():
            return self._writing is not None
        self._writing.shard.result()
        return False

    def written(self) -> None:
        """To be called by every process once none is ``writing``: what they wrote becomes a checkpoint, in the background."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            if self.processes.is_main:
                if self._committing is not None:
                    self._committing.result()
                self._committing = self._thread.submit(self._commit, writing)

    def settle(self) -> None:
        """Until what was saved is a checkpoint; raises the error with which it is not. Collective."""
        if self._writing is not None:
            self._writing.shard.result()
            self.processes.barrier()
            self.written()
        if self._committing is not None:
            done, self._committing = self._committing, None
            done.result()

    def rest(self) -> None:
        """Lets what is under way come to its end; not collective, and may follow an error."""
        wait([f for f in (self._writing.shard if self._writing else None, self._committing) if f is not None])

    def _write(self, name: str, pieces: Sequence[Piece]) -> None:
        """The shard and its digest, in files of their own, on the disk when this returns."""
        folder = self._partial(name) / SHARDS
        folder.mkdir(parents=True, exist_ok=True)
        shard = folder / f"rank-{self.processes.rank:05d}.safetensors"
        digest = hashlib.sha256()
        with shard.open("wb") as file:
            for part in shard_parts(pieces):
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        atomic.write_json(shard.with_suffix(".json"), {shard.name: digest.hexdigest()})

    def _digests(self, name: str) -> dict[str, str]:
        """Of all processes' shards, whose files are taken away."""
        digests: dict[str, str] = {}
        for file in sorted((self._partial(name) / SHARDS).glob("rank-*.json")):
            digests |= json.loads(file.read_text(encoding="ascii"))
            file.unlink()
        if len(digests) != self.processes.world:
            raise IntegrityError(
                f"{self._partial(name)}: shards of {len(digests)} processes, not of {self.processes.world}",
                remedy="--out must lie on a file system that all nodes share",
            )
        return digests

    def _commit(self, writing: _Writing) -> None:
        partial = self._partial(writing.name)
        checkpoints.write_shards_manifest(partial, writing.manifest, self._digests(writing.name))
        atomic.fsync_folder(partial / SHARDS)
        target = self.path / writing.name
        if target.exists() and atomic.exchange(partial, target):  # of the same step
            _remove(partial)
        else:
            if target.exists():
                _remove(target)
            os.replace(partial, target)
        atomic.fsync_folder(self.path)
        atomic.point_to(self.path / checkpoints.LATEST, writing.name)
        for old in self._all()[:-KEPT]:
            _remove(old)

    def _partial(self, name: str) -> Path:
        return self.path / f".{name}{PARTIAL}"

    def finish(self, epochs: int, pieces: Sequence[Piece], metrics: dict[str, float]) -> Path:
        """The final model, a checkpoint of one file; the main process reads it out of everybody's shards, array by array."""
        self.settle()
        self._write("final", pieces)
        self.processes.barrier()
        if self.processes.is_main:
            with ShardReader(self._partial("final") / SHARDS, self._digests("final")) as shards:
                parts = shards.whole_parts(MODEL_PREFIX)
                checkpoints.save_streamed(self.path / "final", self._manifest(epochs, metrics), parts)
            atomic.point_to(self.path / checkpoints.LATEST, "final")
            shutil.rmtree(self._partial("final"))
        self.processes.barrier()
        return self.path / "final"

    def newest(self) -> Found | None:
        """Raises ConfigError when the run in this folder is another one, IntegrityError where a byte was changed. Collective."""
        folders = self._all()
        if not folders:
            return None
        last = folders[-1]
        manifest = read_manifest(CheckpointManifest, last)
        if (
            manifest.seed != self.seed
            or manifest.parent_sha256 != self.parent_sha256
            or not self._is_of(manifest.config)
        ):
            raise ConfigError(
                f"{self.path}: holds a run with another configuration, seed or start",
                remedy="name a new --out folder, or repeat the command that began this run",
            )
        shards = checkpoints.open_shards(last, manifest)
        shards.verify(self.processes.rank, self.processes.world)
        epoch, step, numerator, denominator = shards.read(PROGRESS).tolist()
        progress = Progress(epoch=int(epoch), step=int(step), numerator=numerator, denominator=denominator)
        self.processes.barrier()  # nobody goes on unless everybody's files are good
        return Found(progress=progress, shards=shards)

    def _is_of(self, table: Mapping[str, Any]) -> bool:
        """Whether a run of this configuration wrote it, whatever it said of what may change between two starts."""
        pretrain, now = dict(table.get("pretrain", {})), to_table(self.config.pretrain)
        free = {key: now[key] for key in FREE if key in now}
        return describes({**table, "pretrain": {**pretrain, **free}}, self.config)

    def _all(self) -> list[Path]:
        return sorted(p for p in self.path.glob("epoch-*") if (p / MANIFEST_NAME).is_file())

    def _manifest(self, epoch: int, metrics: dict[str, float]) -> CheckpointManifest:
        return CheckpointManifest(
            application=self.application.name,
            config=to_table(self.config),
            stage="pretrain",
            step=epoch,
            seed=self.seed,
            clients_seen=self.clients,
            parent_sha256=self.parent_sha256,
            lineage=self.lineage,
            metrics=metrics,
            versions={"torch": torch.__version__},
        )


def _remove(checkpoint: Path) -> None:
    """Its manifest first: a folder that is half gone is no checkpoint."""
    (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
