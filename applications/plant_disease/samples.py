"""A sample: a photograph; its label: the name of a class."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_disease.data import TABLE_NAME
from fl_core.contracts.errors import DataError
from fl_core.imagery import photographs
from fl_core.learning.samples import Sample, SampleFormat

LABEL_LIMIT = 100
PROBE_SIDE = 32  # the smallest that a model may take: decodes the whole file


def check(path: Path) -> dict[str, Any]:
    photographs.read_square(path, path.name, PROBE_SIDE)
    return {"schema": "image"}


def label(value: Any) -> str:
    name = value.strip() if isinstance(value, str) else ""
    if not name or len(name) > LABEL_LIMIT or not name.isprintable():
        raise DataError(f"label {str(value)[:LABEL_LIMIT]!r} is not the name of a class")
    return name


def encode(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    image = np.asarray(arrays.get("image", 0))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"array 'image' is {image.dtype}{image.shape}, expected uint8 (height, width, 3)")
    return photographs.encode_png(image)


def write(samples: Sequence[Sample], folder: Path, client: str, config: Any) -> None:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["file", "label", "group", "client"])
    for sample in samples:
        name = sample.id + sample.path.suffix
        _link(sample.path, folder / name)
        unknown = config.data.classes[0] if config is not None else "unknown"
        table.writerow([name, unknown if sample.label is None else sample.label, sample.id, client])
    (folder / TABLE_NAME).write_text(out.getvalue(), encoding="utf-8")


def fits(sample: Sample, config: Any) -> bool:
    return config is None or sample.label in config.data.classes


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


FORMAT = SampleFormat(
    suffixes=(".png", ".jpg", ".jpeg"), check=check, label=label, encode=encode, write=write, fits=fits
)
