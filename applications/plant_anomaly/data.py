"""Native format: a folder with ``labels.csv`` (file, label; optional mask, client, site, group) and its images.

``mask`` names an image of the diseased tissue (anything but 0). Images whose label is not in ``data.healthy`` are scored, never learned from.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly.config import Config
from applications.plant_anomaly.pipeline import UNKNOWN
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.imagery import photographs
from fl_core.learning.examples import Examples
from fl_core.storage import atomic, tables

Array = npt.NDArray[Any]
TABLE_NAME = "labels.csv"
COLUMNS = ("file", "label", "mask", "client", "site", "group")
MAX_BYTES = 8 * 2**30  # of all decoded images together


@dataclass(frozen=True)
class Photograph:
    """file: unique, relative; source: a file or (S, S, 3) uint8; lesions: a file, (S, S) bool, or none known."""

    file: str
    label: str
    client: str
    site: str
    group: str
    source: Path | Array
    lesions: Path | Array | None

    def pixels(self, side: int) -> Array:
        if isinstance(self.source, Path):
            return photographs.read_square(self.source, self.file, side)
        return photographs.from_pixels(self.source, side)

    def mask(self, side: int) -> Array:
        """(side, side) uint8: 1 = diseased tissue, 0 = none, UNKNOWN."""
        if self.lesions is None:
            return np.full((side, side), UNKNOWN, np.uint8)
        found = (
            photographs.read_labels(self.lesions, self.lesions.name) if isinstance(self.lesions, Path) else self.lesions
        )
        edge = min(found.shape)
        top, left = ((n - edge) // 2 for n in found.shape)
        marked = (found[top : top + edge, left : left + edge] > 0).astype(np.uint8)
        if edge == side:
            return marked
        grown = photographs.from_pixels(np.repeat(255 * marked[..., None], 3, -1), side)
        return (grown[..., 0] > 127).astype(np.uint8)


@dataclass(frozen=True)
class Photographs:
    items: tuple[Photograph, ...]

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted({p.client for p in self.items}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        return type(self)(tuple(p for p in self.items if p.client in wanted))

    def write(self, folder: Path) -> None:
        """Images as they were encoded; masks as PNG."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        with atomic.new_folder(folder) as temporary:
            for item in self.items:
                mask = "" if item.lesions is None else f"masks/{item.file}.png"
                for name, source in ((item.file, item.source), (mask, item.lesions)):
                    if not name:
                        continue
                    target = temporary / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if isinstance(source, Path):
                        shutil.copyfile(source, target)
                    elif source is not None:
                        target.write_bytes(
                            photographs.encode_png(source if source.ndim == 3 else 255 * source.astype(np.uint8))
                        )
                table.writerow([item.file, item.label, mask, item.client, item.site, item.group])
            (temporary / TABLE_NAME).write_text(out.getvalue(), encoding="utf-8")

    def examples(self, config: Any) -> Examples:
        """``image`` (N, S, S, 3) uint8; targets (N, S, S, 4) uint8: the image as it should be reconstructed, and its lesions.

        Columns label, site, sick (bool) beside the usual ones. Raises DataError for an image that does not decode.
        """
        cfg: Config = config
        side, count = cfg.data.image_size, len(self.items)
        if count * side * side * 7 > MAX_BYTES:
            raise DataError(
                f"{count} images of {side} x {side} pixels take over {MAX_BYTES:,} bytes",
                remedy="lower data.image_size, or split the data set",
            )
        targets = np.empty((count, side, side, 4), np.uint8)
        for i, item in enumerate(self.items):
            targets[i, ..., :3] = item.pixels(side)
            targets[i, ..., 3] = item.mask(side)
        sick = np.array([item.label not in cfg.data.healthy for item in self.items], bool)
        columns = {"example_id": "file", "client": "client", "group": "group", "label": "label", "site": "site"}
        return Examples(
            {"image": targets[..., :3].copy()},
            targets,
            {
                **{name: np.array([getattr(p, a) for p in self.items], np.str_) for name, a in columns.items()},
                "sick": sick,
                "trainable": ~sick,
            },
        )


def read(path: Path) -> Photographs:
    """Raises DataError naming the file, the column or the line. Images are decoded later, by ``examples``."""
    table = path / TABLE_NAME
    rows = tables.read_csv(table, required=("file", "label"), limit_rows=1_000_000)
    owner = next((c for c in ("client", "site") if c in rows[0]), "")
    found: list[Photograph] = []
    seen: set[str] = set()
    for line, row in enumerate(rows, start=2):
        where = f"{table}: line {line}"
        known = {k: (v or "").strip() for k, v in row.items()}
        if known["file"] in seen:
            raise DataError(f"{where}: {known['file']} is listed twice")
        if not known["label"]:
            raise DataError(f"{where}: label is empty")
        seen.add(known["file"])
        source = photographs.inside(path, where, known["file"])
        photographs.check_image(source, known["file"])
        lesions = photographs.inside(path, where, known["mask"]) if known.get("mask") else None
        if lesions is not None:
            photographs.check_image(lesions, known["mask"])
        try:
            client = checked_name(known[owner] if owner else path.resolve().name, owner or "client")
        except InputError as error:
            raise DataError(f"{where}: {error.message}", remedy=error.remedy) from None
        group = known.get("group") or known["file"]
        found.append(Photograph(known["file"], known["label"], client, known.get("site", ""), group, source, lesions))
    return Photographs(tuple(found))
