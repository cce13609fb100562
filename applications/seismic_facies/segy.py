"""A post-stack SEG-Y volume, whatever the order of its traces. Torch-free; segyio is imported when a file is opened.

Geometry comes from the trace headers, not from the order of the traces: every pair of inline and crossline must be there
exactly once. What is wrong is told with the number of the trace.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import DataError, EnvironmentFault

Array = npt.NDArray[Any]
HEADER_BYTES, TRACE_HEADER_BYTES = 3600, 240
SAMPLES_BYTE, INTERVAL_BYTE = 115, 117
SAMPLE_BYTES = {1: 4, 2: 4, 3: 2, 5: 4, 6: 8, 8: 1, 9: 8, 10: 4, 11: 2, 12: 8, 16: 1}


class SegyVolume:
    """(inlines, crosslines, samples) float32, read trace by trace; ``inlines``, ``crosslines``: their numbers."""

    dtype = np.dtype(np.float32)

    def __init__(self, path: Path, inline_byte: int = 189, crossline_byte: int = 193) -> None:
        self.path = path
        check_length(path)
        try:
            import segyio
        except ImportError:
            raise EnvironmentFault(
                f"{path}: segyio is not installed", remedy="pip install 'fieldfleet[volumes]'"
            ) from None
        try:
            self._file = segyio.open(str(path), ignore_geometry=True)
        except Exception as error:  # segyio raises RuntimeError, OSError and ValueError
            raise DataError(f"{path}: not a readable SEG-Y file: {error}") from None
        try:
            self._file.mmap()
            headers = [np.asarray(self._file.attributes(b)[:]) for b in (inline_byte, crossline_byte)]
            self._check_traces()
        except (KeyError, ValueError, OSError) as error:
            raise DataError(f"{path}: trace headers cannot be read: {error}") from None
        self._trace, self.inlines, self.crosslines = grid(path, headers[0], headers[1])
        self.shape = (*self._trace.shape, len(self._file.samples))
        self._lock = threading.Lock()

    def _check_traces(self) -> None:
        """Every trace as long as the file's header says, and sampled alike."""
        checked: list[tuple[int, int, str]] = [
            (SAMPLES_BYTE, len(self._file.samples), "samples"),
            (INTERVAL_BYTE, 0, "µs"),
        ]
        for byte, want, unit in checked:
            found = np.asarray(self._file.attributes(byte)[:])
            first = want or int(found[0])
            odd = np.flatnonzero((found != first) & (found != 0))
            if len(odd):
                raise DataError(f"{self.path}: trace {int(odd[0])} has {int(found[odd[0]])} {unit}, the file {first}")

    def trace_number(self, row: int, column: int) -> int:
        """Where in the file, counted from 0, the trace at this inline and crossline is (both counted from 0)."""
        return int(self._trace[row, column])

    def __getitem__(self, index: Any) -> Array:
        parts: list[slice] = [slice(None)] * 3
        given = index if isinstance(index, tuple) else (index,)
        parts[: len(given)] = given
        rows, columns, samples = parts
        traces = self._trace[rows, columns]
        made = np.empty((*traces.shape, len(range(*samples.indices(self.shape[2])))), np.float32)
        with self._lock:  # a segyio file has one position
            for at in np.ndindex(traces.shape):
                made[at] = self._file.trace.raw[int(traces[at])][samples]
        return made


def check_length(path: Path) -> None:
    """The file holds whole traces. Raises DataError naming the trace in which it ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes are no SEG-Y file: its header alone takes {HEADER_BYTES}")
    samples, form, extended = (int.from_bytes(head[at : at + 2], "big") for at in (3220, 3224, 3504))
    if form not in SAMPLE_BYTES or not samples:
        raise DataError(
            f"{path}: {samples} samples a trace in format {form}", remedy="not SEG-Y, or in little-endian order"
        )
    trace = TRACE_HEADER_BYTES + samples * SAMPLE_BYTES[form]
    start = HEADER_BYTES + 3200 * (extended if extended < 0x8000 else 0)
    whole, rest = divmod(size - start, trace)
    if rest or whole < 1:
        raise DataError(
            f"{path}: truncated: trace {max(whole, 0)} has {max(rest, 0)} of {trace} bytes",
            remedy="copy the file again",
        )


def grid(path: Path, inline: Array, crossline: Array) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """(trace number at [inline, crossline], inline numbers, crossline numbers). Raises DataError where traces do not fill a grid."""
    inlines, row = np.unique(inline, return_inverse=True)
    crosslines, column = np.unique(crossline, return_inverse=True)
    cells = len(inlines) * len(crosslines)
    cell = row * len(crosslines) + column
    order = np.argsort(cell, kind="stable")
    twice = np.flatnonzero(np.diff(cell[order]) == 0)
    if len(twice):
        a, b = int(order[twice[0]]), int(order[twice[0] + 1])
        raise DataError(
            f"{path}: traces {a} and {b} both are inline {inline[b]}, crossline {crossline[b]}",
            remedy="the file is not a post-stack volume, or its line numbers lie in other header bytes: "
            "columns inline_byte and crossline_byte of volumes.csv",
        )
    if len(cell) != cells:
        missing = int(np.setdiff1d(np.arange(cells), cell)[0])
        raise DataError(
            f"{path}: {len(cell)} traces do not fill {len(inlines)} inlines x {len(crosslines)} crosslines: "
            f"inline {inlines[missing // len(crosslines)]}, crossline {crosslines[missing % len(crosslines)]} is missing",
            remedy="cut the volume to a rectangle, or fill it with traces of zeros",
        )
    for name, numbers in (("inline", inlines), ("crossline", crosslines)):
        steps = np.diff(numbers)
        if len(steps) and (steps != steps[0]).any():
            at = int(np.flatnonzero(steps != steps[0])[0])
            raise DataError(
                f"{path}: {name}s go on in steps of {steps[0]}, but from {numbers[at]} to {numbers[at + 1]}",
                remedy="lines are missing: cut the volume there",
            )
    return order.reshape(len(inlines), len(crosslines)).astype(np.int64), inlines, crosslines
