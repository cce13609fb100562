"""Native format: a folder with ``volumes.csv`` and the volumes that it names.

volumes.csv: volume, client, amplitude; optional labels, company, inline_byte, crossline_byte. ``amplitude`` and
``labels`` are files beside it: .sgy or .segy, .npy, .npz (arrays ``amplitude`` and ``labels``, or the only one), .zarr.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.config import Config
from applications.seismic_facies.pipeline import UNLABELLED
from applications.seismic_facies.volumes import Volume, check_finite, copy_npy, open_volume
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.learning.examples import Examples
from fl_core.learning.windows import Windows
from fl_core.storage import atomic, tables

TABLE_NAME = "volumes.csv"
HEADINGS = ("volume", "client", "amplitude", "labels", "company")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Block:
    """One volume of one client. labels: uint8 of the amplitude's shape in memory, or a volume on disk, or none."""

    name: str
    client: str
    company: str
    amplitude: Volume
    labels: Volume | Array | None

    @property
    def label_volume(self) -> Volume | None:
        return Volume.of(self.labels, f"{self.name}: labels") if isinstance(self.labels, np.ndarray) else self.labels


@dataclass(frozen=True)
class Unlabelled:
    """Labels of a volume that has none."""

    shape: tuple[int, int, int]

    def __getitem__(self, index: tuple[slice, ...]) -> Array:
        size = [len(range(*cut.indices(n))) for cut, n in zip(index, self.shape, strict=True)]
        return np.full(size, UNLABELLED, np.uint8)


@dataclass(frozen=True)
class Finish:
    """What is done with amplitudes once they are read: finite, and in units of their volume's root mean square."""

    origins: tuple[str, ...]
    scales: tuple[float, ...]

    def __call__(self, window: Array, source: int, corner: tuple[int, ...]) -> Array:
        check_finite(window, self.origins[source], corner)
        return np.asarray(window, np.float32) / np.float32(self.scales[source])


@dataclass(frozen=True)
class Volumes:
    blocks: tuple[Block, ...]

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted({b.client for b in self.blocks}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        return type(self)(tuple(b for b in self.blocks if b.client in wanted))

    def write(self, folder: Path) -> None:
        """Memory-mapped npy files, slab by slab."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(HEADINGS)
        with atomic.new_folder(folder) as temporary:
            for block in self.blocks:
                files = [f"{block.name}.amplitude.npy", f"{block.name}.labels.npy" if block.labels is not None else ""]
                copy_npy(block.amplitude, temporary / files[0], np.float32)
                if block.label_volume is not None:
                    block.label_volume.check_labels()
                    copy_npy(block.label_volume, temporary / files[1], np.uint8)
                table.writerow([block.name, block.client, *files, block.company])
            (temporary / TABLE_NAME).write_text(out.getvalue(), encoding="utf-8")

    def examples(self, config: Any) -> Examples:
        """Sub-volumes of ``data.crop``, every ``data.stride``, the last of each axis at its end.

        In memory up to ``data.in_memory_mb``; else ``Windows``, read from the files when they are used. Columns: company,
        volume, and the sub-volume's first inline, crossline and sample in it. A sub-volume without a single label is
        scored, never learned from. Raises DataError for a volume smaller than a sub-volume and labels outside data.classes.
        """
        cfg: Config = config
        d = cfg.data
        corners = [starts(b, d.crop, d.stride) for b in self.blocks]
        for block in self.blocks:
            if block.label_volume is not None:
                block.label_volume.check_labels(d.classes)
        table = np.concatenate([np.insert(c, 0, k, axis=1) for k, c in enumerate(corners)]) if corners else np.zeros((0, 4), np.int64)  # fmt: skip
        size = (d.crop, d.crop, d.crop)
        finish = Finish(tuple(b.amplitude.origin for b in self.blocks), tuple(b.amplitude.scale for b in self.blocks))
        amplitude = Windows([b.amplitude.data for b in self.blocks], table, size, np.float32, finish=finish, leading=1)
        truths = [b.label_volume.data if b.label_volume else Unlabelled(b.amplitude.shape) for b in self.blocks]
        labels = Windows(truths, table, size, np.uint8)
        columns = self._columns(table)
        columns["trainable"] = np.array([bool((labels[i] != UNLABELLED).any()) for i in range(len(labels))])
        if amplitude.nbytes + labels.nbytes <= d.in_memory_mb * 2**20:
            return Examples({"amplitude": np.asarray(amplitude)}, np.asarray(labels), columns)
        lazy: Any = amplitude
        lazy_labels: Any = labels
        return Examples({"amplitude": lazy}, lazy_labels, columns)

    def _columns(self, table: npt.NDArray[np.int64]) -> dict[str, Array]:
        facts = [(b.name, b.client, b.company) for b in self.blocks]
        name, client, company = (np.array([f[k] for f in facts], np.str_)[table[:, 0]] for k in range(3))
        ids = [f"{n}/{i}-{j}-{k}" for n, (i, j, k) in zip(name.tolist(), table[:, 1:].tolist(), strict=True)]
        return {
            "example_id": np.array(ids, np.str_),
            "client": client,
            "group": name,
            "volume": name,
            "company": company,
            **{axis: table[:, 1 + a] for a, axis in enumerate(("inline", "crossline", "sample"))},
        }


def positions(length: int, size: int, stride: int) -> list[int]:
    """First indices of windows of ``size`` every ``stride`` that cover ``length``; the last one ends where it ends."""
    return sorted({*range(0, length - size + 1, stride), length - size})


def starts(block: Block, size: int, stride: int) -> npt.NDArray[np.int64]:
    shape = block.amplitude.shape
    if min(shape) < size:
        raise DataError(
            f"{block.amplitude.origin}: {' x '.join(map(str, shape))} voxels are smaller than data.crop = {size}",
            remedy=f"--set data.crop={1 << (min(shape).bit_length() - 1)}, or leave this volume out",
        )
    axes = [positions(n, size, stride) for n in shape]
    return np.array(np.meshgrid(*axes, indexing="ij"), np.int64).reshape(3, -1).T


def read(path: Path) -> Volumes:
    """Raises DataError naming the file, the column or the line. Voxels are read later, by ``examples``."""
    table = path / TABLE_NAME
    rows = tables.read_csv(table, required=HEADINGS[:3], limit_rows=100_000)
    seen: set[str] = set()
    blocks = []
    for line, row in enumerate(rows, start=2):
        where = f"{table}: line {line}"
        try:
            name, client = (checked_name(row[k].strip(), k) for k in ("volume", "client"))
        except InputError as error:
            raise DataError(f"{where}: {error.message}", remedy=error.remedy) from None
        if name in seen:
            raise DataError(f"{where}: the volume {name!r} is listed twice")
        seen.add(name)
        blocks.append(_block(path, where, name, client, {k: (v or "").strip() for k, v in row.items() if k}))
    return Volumes(tuple(blocks))


def _block(path: Path, where: str, name: str, client: str, row: dict[str, str]) -> Block:
    lines = {}
    for key, usual in (("inline_byte", 189), ("crossline_byte", 193)):
        text = row.get(key) or str(usual)
        if not text.isdigit() or not 1 <= int(text) <= 237:
            raise DataError(f"{where}: {key} {text!r} is no byte of a trace header", remedy="accepted: 1 to 237")
        lines[key] = int(text)
    amplitude = open_volume(_inside(path, where, row["amplitude"]), key="amplitude", **lines)
    labels = None
    if row.get("labels"):
        labels = open_volume(_inside(path, where, row["labels"]), key="labels", **lines)
        if labels.shape != amplitude.shape:
            raise DataError(
                f"{labels.origin}: labels are {list(labels.shape)}, {amplitude.origin} is {list(amplitude.shape)}",
                remedy="labels need the axes and the size of their amplitudes",
            )
    return Block(name, client, row.get("company", ""), amplitude, labels)


def _inside(path: Path, where: str, name: str) -> Path:
    """A file of the data set. Raises DataError for one outside its folder, by its name or by a link."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise DataError(f"{where}: {name!r} is not a file inside the data set's folder")
    if not (path / name).resolve().is_relative_to(path.resolve()):
        raise DataError(f"{where}: {name!r} links to a file outside the data set's folder")
    return path / name
