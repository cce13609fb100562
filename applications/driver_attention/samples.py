"""A sample: one clip, an npz file with ``front``, ``cabin``, ``side`` (n, H, W) uint8, each with ``VIEW_s`` (n,) times, and
``kinematics`` (n, C) with ``kinematics_s``; whatever is not there is missing. Its end is the last time. Its label:
{"conflict": 0 or 1, "state": NAME}, one of them at least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_attention import pipeline
from applications.driver_attention.config import VIEWS
from applications.driver_attention.data import KINEMATICS, Clip, Drives, Motion, Recording
from applications.driver_attention.media import Stream
from fl_core.contracts.errors import DataError
from fl_core.learning.samples import Sample, SampleFormat, npz_bytes
from fl_core.storage import archive

LIMIT = 1 << 28
Content = Mapping[str, npt.NDArray[Any]]


def check(path: Path) -> dict[str, Any]:
    recording = _recording("sample", archive.read_npz(path, limit=LIMIT), path.name)
    return {"schema": "clip", "views": sorted(recording.views)}


def _recording(name: str, arrays: Content, origin: str) -> Recording:
    views = {view: Stream(_times(arrays, view, origin), _frames(arrays[view], view, origin)) for view in VIEWS if view in arrays}  # fmt: skip
    if not views:
        raise DataError(f"{origin}: holds no view", remedy=f"arrays named {', '.join(VIEWS)}")
    motion = None
    if KINEMATICS in arrays:
        values, times = np.asarray(arrays[KINEMATICS]), _times(arrays, KINEMATICS, origin)
        if values.dtype.kind not in "fiu" or values.ndim != 2 or values.shape[1] != len(pipeline.CHANNELS):
            raise DataError(f"{origin}: {KINEMATICS} must be numbers of shape (n, {len(pipeline.CHANNELS)})")
        motion = Motion(times, values.astype(np.float32))
    return Recording(name, views, motion)


def _frames(x: npt.NDArray[Any], view: str, origin: str) -> npt.NDArray[np.uint8]:
    if x.dtype != np.uint8 or x.ndim != 3 or 0 in x.shape:
        raise DataError(f"{origin}: {view} is {x.dtype}{x.shape}, expected uint8 of shape (n, H, W)")
    return x


def _times(arrays: Content, name: str, origin: str) -> npt.NDArray[np.float64]:
    times = np.asarray(arrays.get(f"{name}_s", np.zeros(0)))
    if (
        times.dtype.kind not in "fiu"
        or times.shape != (len(np.atleast_1d(arrays[name])),)
        or not np.isfinite(times).all()
    ):
        raise DataError(f"{origin}: {name}_s must hold one time in seconds for each of {name}")
    if (np.diff(times) <= 0).any():
        raise DataError(f"{origin}: {name}_s does not ascend")
    return times.astype(np.float64)


def label(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(value, Mapping) and set(value) <= {"conflict", "state"}:
        if str(value.get("conflict")) in ("0", "1"):
            found["conflict"] = int(str(value["conflict"]))
        if value.get("state") in pipeline.STATES:
            found["state"] = value["state"]
    if not found or set(found) != set(value):
        raise DataError(
            f"label {str(value)[:100]!r}: expected conflict (0 or 1), state ({', '.join(pipeline.STATES)}), or both"
        )
    return found


def encode(arrays: Content) -> bytes:
    content = {k: np.asarray(v) for k, v in arrays.items() if k.removesuffix("_s") in (*VIEWS, KINEMATICS)}
    _recording("sample", content, "the sample")
    return npz_bytes(content)


def write(samples: Sequence[Sample], folder: Path, client: str, config: Any) -> None:
    recordings, clips = {}, []
    for number, sample in enumerate(samples, start=1):
        name = f"{number:06d}"
        recording = _recording(name, archive.read_npz(sample.path, limit=LIMIT), sample.path.name)
        end = max(float(stream.times[-1]) for stream in recording.views.values())
        known: Mapping[str, Any] = sample.label or {}
        state = pipeline.STATES.index(known["state"]) if "state" in known else math.nan
        conflict = float(known.get("conflict", math.nan))
        clips.append(Clip(sample.id, name, f"vehicle-{client}", sample.id, end, conflict, float(state)))
        recordings[name] = recording
    Drives(recordings, tuple(clips)).write_into(folder)


FORMAT = SampleFormat(suffixes=(".npz",), check=check, label=label, encode=encode, write=write)
