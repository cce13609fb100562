"""Rows gathered to arrays (N, ...): in memory, or, where they are too large for it, in files that are memory-mapped. Torch-free."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import EnvironmentFault
from fl_core.learning.windows import Windows

Array = npt.NDArray[Any]
Row = dict[str, Array]


def gathered(rows: Iterable[Row], count: int, limit: int) -> dict[str, Any]:
    """name -> (count, ...): arrays if all of them take at most ``limit`` bytes, else ``Windows`` that read when used.

    All rows have the names, shapes and types of the first. Raises EnvironmentFault where the disk is too full for them.
    """
    several = iter(rows)
    first = next(several)
    every = chain([first], several)
    if count * sum(array.nbytes for array in first.values()) <= limit:
        made = {name: np.empty((count, *array.shape), array.dtype) for name, array in first.items()}
        for number, row in enumerate(every):
            for name, array in row.items():
                made[name][number] = array
        return made
    return _mapped(every, first, count)


def _mapped(rows: Iterator[Row], like: Row, count: int) -> dict[str, Any]:
    """Raw files in a folder that is gone at the end: what is mapped lives on until nobody uses it."""
    try:
        with tempfile.TemporaryDirectory(prefix="fieldfleet-designs-") as folder, ExitStack() as files:
            paths = {name: Path(folder) / name for name in like}
            targets: dict[str, BinaryIO] = {n: files.enter_context(p.open("wb")) for n, p in paths.items()}
            for row in rows:
                for name, array in row.items():
                    targets[name].write(np.ascontiguousarray(array).data)
            files.close()  # so that the last bytes are in the files
            return {name: _windows(paths[name], array, count) for name, array in like.items()}
    except OSError as error:
        raise EnvironmentFault(
            f"{tempfile.gettempdir()}: designs that do not fit memory go there, and cannot be written: {error}",
            remedy="set TMPDIR to a disk with room, or raise data.in_memory_mb",
        ) from None


def _windows(path: Path, like: Array, count: int) -> Windows:
    mapped = np.asarray(np.memmap(path, like.dtype, "r", shape=(count, *like.shape)))
    corners = np.zeros((count, 1 + like.ndim), np.int64)
    corners[:, 0] = np.arange(count)
    return Windows(list(mapped), corners, like.shape, like.dtype)
