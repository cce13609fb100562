"""Arrays in shards: each file holds pieces of arrays, and says of each piece where in the whole array it lies.

A shard is a safetensors file whose metadata has, under ``pieces``, a JSON object: name -> [whole shape, offset] of every
array that is not whole in it. Whoever writes knows only its own pieces; whoever reads asks for any region of any array and
need not know into how many files, or along which axes, it was cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from fl_core.contracts import arrays as array_format
from fl_core.contracts.errors import IntegrityError
from fl_core.storage import atomic

PIECES = "pieces"
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A region of the array ``name``: ``array`` lies at ``offset`` of the whole, which has ``shape``."""

    name: str
    shape: Shape
    offset: Shape
    array: npt.NDArray[Any]


def shard_parts(pieces: Iterable[Piece]) -> Iterator[bytes | memoryview]:
    """The file of these pieces, in parts that need not be joined; one piece of an array at most."""
    table: dict[str, npt.NDArray[Any]] = {}
    cut: dict[str, list[Shape]] = {}
    for piece in pieces:
        assert piece.name not in table, piece.name
        table[piece.name] = piece.array
        if piece.array.shape != piece.shape:
            cut[piece.name] = [piece.shape, piece.offset]
    yield from array_format.pieces(table, metadata={PIECES: json.dumps(cut)})


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """One piece on the disk."""

    file: str
    offset: Shape
    extent: Shape


class ShardReader:
    """Reads regions of arrays out of the shards of ``folder``; ``digests`` maps each file's name to its sha256.

    Raises IntegrityError naming the file where one is missing or not readable, and the array where pieces do not make it up.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self.folder, self.digests = folder, digests
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self._stored: dict[str, list[_Stored]] = {}
        self._files: dict[str, Any] = {}
        for file in sorted(digests):
            self._index(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hashes every ``parts``-th file, so that several processes share the work."""
        for file in sorted(self.digests)[part::parts]:
            if atomic.sha256_file(self.folder / file) != self.digests[file]:
                raise IntegrityError(
                    f"{self.folder / file}: its sha256 is not the one in the manifest",
                    remedy="the file was changed or damaged: copy it again",
                )

    def _index(self, file: str) -> None:
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
            raise IntegrityError(f"{path}: no such file", remedy="the checkpoint is incomplete: copy it again")
        try:
            opened = safe_open(path, framework="np")
            cut = json.loads((opened.metadata() or {}).get(PIECES, "{}"))
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                found = opened.get_slice(name)
                extent = tuple(found.get_shape())
                shape, offset = (tuple(map(int, part)) for part in cut.get(name, [extent, (0,) * len(extent)]))
                self._note(
                    name,
                    shape,
                    array_format.DTYPES[found.get_dtype()],
                    _Stored(file=file, offset=offset, extent=extent),
                )
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise IntegrityError(f"{path}: not a readable shard: {error}") from None
        self._files[file] = opened

    def _note(self, name: str, shape: Shape, dtype: np.dtype[Any], stored: _Stored) -> None:
        known = self.shapes.setdefault(name, shape), self.dtypes.setdefault(name, dtype)
        inside = len(shape) == len(stored.offset) == len(stored.extent) and all(
            low >= 0 and low + size <= whole
            for low, size, whole in zip(stored.offset, stored.extent, shape, strict=True)
        )
        if known != (shape, dtype) or not inside:
            raise ValueError(f"array {name!r} does not fit its other pieces")
        self._stored.setdefault(name, []).append(stored)

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.shapes if name.startswith(prefix))

    def read(self, name: str, offset: Shape | None = None, extent: Shape | None = None) -> npt.NDArray[Any]:
        """The region of ``extent`` at ``offset`` (default: the whole array)."""
        if name not in self.shapes:
            raise IntegrityError(f"{self.folder}: array {name!r} is missing")
        shape = self.shapes[name]
        offset = (0,) * len(shape) if offset is None else offset
        extent = shape if extent is None else extent
        made = np.empty(extent, self.dtypes[name])
        filled = 0
        for stored in self._stored[name]:
            lows = [max(a, b) for a, b in zip(offset, stored.offset, strict=True)]
            highs = [min(a + n, b + m) for a, n, b, m in zip(offset, extent, stored.offset, stored.extent, strict=True)]
            if any(low >= high for low, high in zip(lows, highs, strict=True)):
                continue
            into = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, offset, strict=True))
            out_of = tuple(slice(low - b, high - b) for low, high, b in zip(lows, highs, stored.offset, strict=True))
            opened = self._files[stored.file]
            made[into] = opened.get_slice(name)[out_of] if shape else opened.get_tensor(name)
            filled += math.prod(high - low for low, high in zip(lows, highs, strict=True))
        if filled != made.size:  # pieces never overlap: each is written by one process
            raise IntegrityError(f"{self.folder}: array {name!r} is not complete in these shards")
        return made

    def whole_parts(self, prefix: str) -> Iterator[bytes | memoryview]:
        """A safetensors file of all whole arrays under ``prefix``, which is cut off; one array in memory at a time."""
        names = self.names(prefix)
        yield array_format.header({n.removeprefix(prefix): (self.dtypes[n], self.shapes[n]) for n in names})
        for name in names:
            yield from array_format.data_pieces(self.read(name))
