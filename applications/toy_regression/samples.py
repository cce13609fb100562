"""A sample: an npz file with ``x`` (F,); its label: a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.toy_regression.data import Rows, write_rows
from fl_core.contracts.errors import DataError
from fl_core.learning.samples import Sample, SampleFormat, npz_bytes
from fl_core.storage import archive

LIMIT = 1 << 20


def check(path: Path) -> dict[str, Any]:
    return {"schema": f"x:{len(_features(path))}"}


def _features(path: Path) -> npt.NDArray[np.float32]:
    return _checked(archive.read_npz(path, required=("x",), limit=LIMIT)["x"], path.name)


def _checked(x: npt.NDArray[Any], name: str) -> npt.NDArray[np.float32]:
    if x.ndim != 1 or x.dtype.kind not in "fiu" or not len(x) or not np.isfinite(x).all():
        raise DataError(f"{name}: x is {x.dtype}{x.shape}, expected finite numbers of shape (features,)")
    return x.astype(np.float32)


def label(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise DataError(f"label {value!r} is not a finite number")
    return number


def encode(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    if "x" not in arrays:
        raise DataError("array 'x' is missing")
    return npz_bytes({"x": _checked(np.asarray(arrays["x"]), "the sample")})


def write(samples: Sequence[Sample], folder: Path, client: str, config: Any) -> None:
    x = np.stack([_features(sample.path) for sample in samples])
    y = np.array([0.0 if sample.label is None else sample.label for sample in samples], np.float32)
    write_rows(Rows(np.full(len(x), client), x, y), folder)


FORMAT = SampleFormat(suffixes=(".npz",), check=check, label=label, encode=encode, write=write)
