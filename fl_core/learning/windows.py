"""Sub-volumes of volumes that stay where they are, memory-mapped or in chunks on disk: read when they are used. Torch-free.

``Windows`` stands where an array of examples (N, ...) stands in ``Examples``: indexing it by examples gives fewer windows
and reads nothing; ``np.asarray`` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Sliceable(Protocol):
    """np.memmap, a zarr array, a reader of one's own: ``shape``, and rectangular slices that give arrays."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


Finish = Callable[[Array, int, tuple[int, ...]], Array]


def as_read(window: Array, source: int, corner: tuple[int, ...]) -> Array:
    return window


class Windows(np.lib.mixins.NDArrayOperatorsMixin):
    """(N, *leading, *size) of ``dtype``: windows of ``size`` at ``corners`` of ``sources``.

    corners: (N, 1 + d) int64: which source, and the first index along each of its d axes.
    finish(window, source, corner) -> window: scaling and checks of what was read, before the cast to ``dtype``.
    leading: axes of length 1 put before the window's own, such as a channel axis.
    """

    def __init__(
        self,
        sources: Sequence[Sliceable],
        corners: npt.NDArray[np.int64],
        size: tuple[int, ...],
        dtype: npt.DTypeLike,
        *,
        finish: Finish = as_read,
        leading: int = 0,
    ) -> None:
        self.sources, self.corners, self.size = tuple(sources), corners, tuple(size)
        self.dtype, self.finish, self.leading = np.dtype(dtype), finish, leading

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.corners), *(1,) * self.leading, *self.size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: Any) -> Any:
        """One example, read, for an integer; else windows of the chosen examples, unread."""
        if isinstance(index, (int, np.integer)):
            return self._read(self.corners[index])
        if isinstance(index, tuple):
            raise TypeError("Windows are indexed by examples only; np.asarray reads them")
        return Windows(
            self.sources, self.corners[index], self.size, self.dtype, finish=self.finish, leading=self.leading
        )

    def _read(self, corner: npt.NDArray[np.int64]) -> Array:
        source, *at = (int(c) for c in corner)
        cut = tuple(slice(a, a + n) for a, n in zip(at, self.size, strict=True))
        window = self.finish(np.asarray(self.sources[source][cut]), source, tuple(at))
        return window.astype(self.dtype, copy=False).reshape(self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("windows lie on disk: they cannot become an array without a copy")
        made = np.empty(self.shape, self.dtype)
        for i, corner in enumerate(self.corners):
            made[i] = self._read(corner)
        return made if dtype is None else made.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Arithmetic and comparisons read."""
        read = [np.asarray(x) if isinstance(x, Windows) else x for x in inputs]
        return getattr(ufunc, method)(*read, **options)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        """Concatenating windows gives windows; every other function of numpy reads."""
        if function is np.concatenate and options.get("axis", 0) == 0:
            parts = list(arguments[0])
            if all(isinstance(p, Windows) and self._joins(p) for p in parts):
                return joined(parts)
        read = [_read_all(a) for a in arguments]
        return function(*read, **{k: _read_all(v) for k, v in options.items()})

    def _joins(self, other: Windows) -> bool:
        return (self.size, self.dtype, self.leading) == (other.size, other.dtype, other.leading)


def _read_all(value: Any) -> Any:
    if isinstance(value, Windows):
        return np.asarray(value)
    return type(value)(_read_all(v) for v in value) if isinstance(value, (list, tuple)) else value


def joined(parts: Sequence[Windows]) -> Windows:
    """One after another; parts of the same data set share its sources."""
    first = parts[0]
    if all(p.sources is first.sources for p in parts) and all(p.finish == first.finish for p in parts):
        corners = np.concatenate([p.corners for p in parts])
        return Windows(first.sources, corners, first.size, first.dtype, finish=first.finish, leading=first.leading)
    sources: list[Sliceable] = []
    corners_of, finishers = [], []
    for part in parts:
        moved = part.corners.copy()
        moved[:, 0] += len(sources)
        corners_of.append(moved)
        finishers += [(part.finish, len(sources))] * len(part.sources)
        sources += part.sources

    def finish(window: Array, source: int, corner: tuple[int, ...]) -> Array:
        own, offset = finishers[source]
        return own(window, source - offset, corner)

    return Windows(sources, np.concatenate(corners_of), first.size, first.dtype, finish=finish, leading=first.leading)
