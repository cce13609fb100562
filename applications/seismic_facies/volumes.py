"""Volume files: SEG-Y, npy, npz and zarr as one kind of array (inline, crossline, sample) that is read in pieces.

Everything is checked once before it is used: a pass over the file in slabs finds voxels that are not finite, and the root
mean square that the amplitudes are scaled by. Errors name the file, and the trace or the voxel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.seismic_facies.pipeline import UNLABELLED
from fl_core.contracts.errors import DataError, EnvironmentFault
from fl_core.learning.windows import Sliceable
from fl_core.storage import archive

Array = npt.NDArray[Any]
SLAB_BYTES = 64 * 2**20
SUFFIXES = (".sgy", ".segy", ".npy", ".npz", ".zarr")


@dataclass(frozen=True)
class Volume:
    """``data``: (inlines, crosslines, samples) numbers; ``origin``: how errors name it; in_memory: an array, not a file."""

    data: Sliceable
    origin: str
    in_memory: bool

    @staticmethod
    def of(array: Array, origin: str) -> Volume:
        return Volume(array, origin, True)

    @property
    def shape(self) -> tuple[int, int, int]:
        a, b, c = self.data.shape
        return a, b, c

    def slabs(self) -> Iterator[tuple[int, Array]]:
        """(first inline, inlines...) in order, about 64 MB at once."""
        each = max(1, SLAB_BYTES // (4 * self.shape[1] * self.shape[2]))
        for start in range(0, self.shape[0], each):
            yield start, np.asarray(self.data[start : start + each])

    @cached_property
    def scale(self) -> float:
        """Root mean square of all amplitudes. Raises DataError for a voxel that is not finite and a volume of zeros."""
        total = 0.0
        for start, slab in self.slabs():
            check_finite(slab, self.origin, (start, 0, 0), getattr(self.data, "trace_number", None))
            total += float(np.square(slab, dtype=np.float64).sum())
        mean = total / float(np.prod(self.shape))
        if not mean > 0:
            raise DataError(f"{self.origin}: every amplitude is zero")
        return float(np.sqrt(mean))

    def check_labels(self, classes: tuple[str, ...] = ()) -> None:
        """Raises DataError for a label that is no class number (and not 255); without ``classes``, any number of them."""
        count = len(classes) or UNLABELLED
        for start, slab in self.slabs():
            odd = np.argwhere((slab != UNLABELLED) & ~((slab >= 0) & (slab < count) & (slab == np.floor(slab))))
            if len(odd):
                i, j, k = (int(v) for v in odd[0])
                raise DataError(
                    f"{self.origin}: voxel [{start + i}, {j}, {k}] has the label {slab[i, j, k]}",
                    remedy=f"labels are 0 to {count - 1}, 255 = no label; data.classes names them: {', '.join(classes)}",
                )


def check_finite(
    window: Array, origin: str, corner: tuple[int, ...], trace_number: Callable[[int, int], int] | None = None
) -> None:
    """Raises DataError naming the first voxel that is NaN or infinite, and its trace where the file has traces."""
    if not np.isfinite(window).all():
        at = np.argwhere(~np.isfinite(window))[0] + np.asarray(corner)
        trace = f", trace {trace_number(int(at[0]), int(at[1]))}," if trace_number else ""
        raise DataError(
            f"{origin}: voxel {[int(v) for v in at]} (inline, crossline, sample, counted from 0){trace} is not finite",
            remedy="replace it, or mute the trace with zeros",
        )


def open_volume(path: Path, *, key: str, inline_byte: int = 189, crossline_byte: int = 193) -> Volume:
    """key: the array's name in an npz file (where it holds several). Raises DataError naming the file."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix in (".sgy", ".segy"):
        from applications.seismic_facies.segy import SegyVolume

        return Volume(SegyVolume(path, inline_byte, crossline_byte), str(path), False)
    if suffix == ".npy":
        found: Any = _open_npy(path)
    elif suffix == ".npz":
        arrays = archive.read_npz(path)
        if key not in arrays and len(arrays) != 1:
            raise DataError(f"{path}: array {key!r} is missing", remedy=f"it holds: {', '.join(arrays) or 'nothing'}")
        found = arrays[key] if key in arrays else next(iter(arrays.values()))
    elif suffix == ".zarr":
        found = _open_zarr(path, key)
    else:
        raise DataError(f"{path}: not a known kind of volume", remedy=f"known: {', '.join(SUFFIXES)}")
    kind = np.dtype(found.dtype).kind
    if len(found.shape) != 3 or 0 in found.shape or kind not in "fiub":
        raise DataError(
            f"{path}: is {found.dtype}{list(found.shape)}",
            remedy="a volume is (inlines, crosslines, samples) of numbers",
        )
    return Volume(found, str(path), suffix == ".npz")


def _open_npy(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(
            f"{path}: not a readable npy file: {error}", remedy="it may be truncated: copy it again"
        ) from None


def _open_zarr(path: Path, key: str) -> Any:
    try:
        import zarr
    except ImportError:
        raise EnvironmentFault(f"{path}: zarr is not installed", remedy="pip install 'fieldfleet[volumes]'") from None
    try:
        found = zarr.open(str(path), mode="r")
        if isinstance(found, zarr.Array):
            return found
        names = sorted(found.array_keys())
    except Exception as error:  # zarr raises many kinds for a damaged store
        raise DataError(f"{path}: not a readable zarr array: {error}") from None
    if key not in names and len(names) != 1:
        raise DataError(f"{path}: array {key!r} is missing", remedy=f"it holds: {', '.join(names) or 'no array'}")
    return found[key if key in names else names[0]]


def copy_npy(volume: Volume, path: Path, dtype: npt.DTypeLike) -> None:
    """Slab by slab into an npy file, whatever the volume's size."""
    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=volume.shape)
    for start, slab in volume.slabs():
        target[start : start + len(slab)] = slab
    target.flush()
