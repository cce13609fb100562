"""Photographs with the plant of each pixel. Native format: a folder with ``images.csv`` (file, mask, client; optional group, crop).

``mask`` is a label image: 0 = ground, k = plant k, 65535 (of 16 bits) = not labelled. ``read`` also takes COCO files and the folders of the
leaf segmentation challenge (``formats``).
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation import formats
from applications.plant_segmentation.config import Config
from applications.plant_segmentation.formats import Picture
from applications.plant_segmentation.pipeline import UNLABELLED
from fl_core.contracts.errors import DataError
from fl_core.imagery import photographs
from fl_core.learning.examples import Examples
from fl_core.storage import atomic

Array = npt.NDArray[Any]
COLUMNS = ("file", "mask", "client", "group", "crop")
MAX_BYTES = 8 * 2**30  # of all decoded tiles together


@dataclass(frozen=True)
class Pictures:
    pictures: tuple[Picture, ...]

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted({p.client for p in self.pictures}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        return type(self)(tuple(p for p in self.pictures if p.client in wanted))

    def write(self, folder: Path) -> None:
        """Photographs as they were encoded; labels as 16-bit PNG."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        with atomic.new_folder(folder) as temporary:
            for picture in self.pictures:
                file, mask = f"images/{picture.name}", f"masks/{picture.name}.png"
                for target in (temporary / file, temporary / mask):
                    target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(picture.image, Path):
                    shutil.copyfile(picture.image, temporary / file)
                else:
                    (temporary / file).write_bytes(photographs.encode_png(picture.image))
                (temporary / mask).write_bytes(photographs.encode_png(picture.labels().astype(np.uint16)))
                table.writerow([file, mask, picture.client, picture.group, picture.crop])
            (temporary / formats.TABLE_NAME).write_text(out.getvalue(), encoding="utf-8")

    def examples(self, config: Any) -> Examples:
        """Tiles of ``data.image_size``: ``image`` (N, S, S, 3) uint8, targets (N, S, S) int32 plant numbers.

        Columns picture, row, column (of the tile's corner) and crop beside the usual ones. Raises DataError for a file that
        does not decode and for a mask of another size than its photograph.
        """
        cfg: Config = config
        side = cfg.data.image_size
        images, targets, columns = [], [], []
        for picture in self.pictures:
            pixels, labels = loaded(picture, cfg.data.long_side)
            pixels, labels = padded(pixels, side, None), padded(labels, side, UNLABELLED)
            for row in positions(labels.shape[0], side, cfg.data.stride):
                for column in positions(labels.shape[1], side, cfg.data.stride):
                    cut = slice(row, row + side), slice(column, column + side)
                    images.append(pixels[cut])
                    targets.append(renumbered(labels[cut]))
                    columns.append((f"{picture.name}/{row}-{column}", picture, row, column))
            if len(images) * side * side * 7 > MAX_BYTES:
                raise DataError(
                    f"over {len(images)} tiles of {side} x {side} pixels take more than {MAX_BYTES:,} bytes",
                    remedy="raise data.stride, lower data.long_side, or split the data set",
                )
        of: dict[str, Callable[[Picture], str]] = {
            "client": lambda p: p.client,
            "group": lambda p: p.group,
            "picture": lambda p: p.name,
            "crop": lambda p: p.crop,
        }
        return Examples(
            {"image": np.array(images, np.uint8).reshape(-1, side, side, 3)},
            np.array(targets, np.int32).reshape(-1, side, side),
            {
                "example_id": np.array([c[0] for c in columns], np.str_),
                **{name: np.array([get(c[1]) for c in columns], np.str_) for name, get in of.items()},
                "row": np.array([c[2] for c in columns], np.int64),
                "column": np.array([c[3] for c in columns], np.int64),
            },
        )


def loaded(picture: Picture, long_side: int = 0) -> tuple[Array, Array]:
    """(H, W, 3) uint8 and (H, W) int32, scaled to ``long_side`` (0 = as they are)."""
    pixels, labels = picture.pixels(), picture.labels()
    if labels.shape != pixels.shape[:2]:
        raise DataError(
            f"{picture.name}: the mask is {labels.shape[1]} x {labels.shape[0]} pixels, the photograph {pixels.shape[1]} x {pixels.shape[0]}",
            remedy="masks need the size of their photographs",
        )
    scale = long_side / max(labels.shape) if long_side else 1.0
    if scale != 1.0:
        from PIL import Image

        size = tuple(max(1, round(n * scale)) for n in labels.shape[::-1])
        pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))
        labels = np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    return pixels, labels


def padded(array: Array, side: int, value: int | None) -> Array:
    """At least ``side`` x ``side``: filled with ``value``, or mirrored."""
    missing = [(0, max(0, side - n)) for n in array.shape[:2]] + [(0, 0)] * (array.ndim - 2)
    if not any(after for _, after in missing):
        return array
    if value is None:
        return np.pad(array, missing, mode="symmetric")
    return np.pad(array, missing, constant_values=value)


def renumbered(labels: Array) -> Array:
    """The same plants, numbered 1, 2, ... in this tile: a tile does not depend on what else its photograph shows."""
    inside = (labels > 0) & (labels != UNLABELLED)
    made = np.where(labels == UNLABELLED, UNLABELLED, 0).astype(np.int32)
    made[inside] = np.unique(labels[inside], return_inverse=True)[1] + 1
    return made


def positions(length: int, size: int, stride: int) -> list[int]:
    """First indices of windows of ``size`` every ``stride`` that cover ``length``; the last one ends where it ends."""
    return sorted({*range(0, length - size + 1, stride), length - size})


def read(path: Path) -> Pictures:
    """Any of the formats, told by the files in the folder. Raises DataError naming the file, the column or the line."""
    return Pictures(formats.read(path))
