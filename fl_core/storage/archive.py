"""Bounded reading of npz archives from outside: no pickle, no zip bomb, and errors that name the file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import DataError

DEFAULT_LIMIT = 8 * 2**30


def read_npz(
    path: Path, *, required: tuple[str, ...] = (), limit: int = DEFAULT_LIMIT
) -> dict[str, npt.NDArray[np.generic]]:
    """All arrays of an npz file whose unpacked size is at most ``limit`` bytes.

    Raises DataError when the file is missing, truncated, too large, holds pickled objects or lacks a required array.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > limit:
            raise DataError(f"{path}: unpacks to {unpacked:,} bytes, over the limit of {limit:,}")
        with np.load(path, allow_pickle=False) as arrays:
            result = {name: arrays[name] for name in arrays.files}
    except DataError:
        raise
    except (
        Exception
    ) as error:  # zlib's, lzma's, tokenize's, SyntaxError, MemoryError: numpy parses headers as Python text
        raise DataError(
            f"{path}: not a readable npz file: {error}", remedy="it may be truncated: copy it again"
        ) from None
    missing = [name for name in required if name not in result]
    if missing:
        raise DataError(
            f"{path}: array {missing[0]!r} is missing", remedy=f"it holds: {', '.join(result) or 'nothing'}"
        )
    return result
