"""A sample: one recorded drive, an npz file with ``X`` (rows, channels) and ``channels``; its label: the conflict's rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.driver_conflict import pipeline
from applications.driver_conflict.data import Drives, Event, checked_channels
from fl_core.contracts.errors import DataError
from fl_core.learning.samples import Sample, SampleFormat, npz_bytes
from fl_core.storage import archive

LIMIT = 1 << 28
KEYS, KIND = ("event_start_row", "event_end_row"), "incident_type"


def check(path: Path) -> dict[str, Any]:
    arrays = archive.read_npz(path, required=("X", "channels"), limit=LIMIT)
    channels = checked_channels(Path(path.name), arrays)
    rows = len(arrays["X"])
    if rows < pipeline.WINDOW_ROWS:
        raise DataError(f"{path.name}: {rows} rows are fewer than one window of {pipeline.WINDOW_ROWS}")
    return {"schema": ",".join(channels), "rows": rows}


def label(value: Any) -> dict[str, Any]:
    """{"event_start_row": ..., "event_end_row": ...}, whole numbers or their text; optional ``incident_type``, as coded."""
    rows = []
    for key in KEYS:
        number = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(number, str) and number.isdecimal() and len(number) <= 18:
            number = int(number)
        if type(number) is not int or number < 0:
            raise DataError(f"label {str(value)[:100]!r}: {key} is not a whole number of rows")
        rows.append(number)
    if rows[0] > rows[1]:
        raise DataError(f"label {str(value)[:100]!r}: the conflict ends before it starts")
    found: dict[str, Any] = dict(zip(KEYS, rows, strict=True))
    if kind := value.get(KIND):
        if not isinstance(kind, str) or len(kind) > 100 or not kind.isprintable():
            raise DataError(f"label {str(value)[:100]!r}: {KIND} is not a short text")
        found[KIND] = kind
    return found


def encode(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    missing = [name for name in ("X", "channels") if name not in arrays]
    if missing:
        raise DataError(f"array {missing[0]!r} is missing")
    content = {"X": np.asarray(arrays["X"], np.float32), "channels": np.asarray(arrays["channels"], np.str_)}
    checked_channels(Path("the sample"), content)
    return npz_bytes(content)


def write(samples: Sequence[Sample], folder: Path, client: str, config: Any) -> None:
    channels: tuple[str, ...] = ()
    events = []
    for sample in samples:
        arrays = archive.read_npz(sample.path, required=("X", "channels"), limit=LIMIT)
        channels = checked_channels(sample.path, arrays)
        rows = arrays["X"].astype(np.float32)
        # without a label every window counts: the whole drive is the placeholder
        first, last = (sample.label[key] for key in KEYS) if sample.label is not None else (0, len(rows))
        facts = {
            "event_id": str(_number(sample.id)),
            "vehicle_id": client,
            "event_start_row": str(first),
            "event_end_row": str(last),
            KIND: sample.label.get(KIND, "") if sample.label is not None else "",
            "speed_ok": "1",
        }
        events.append(Event(_number(sample.id), f"vehicle-{client}", rows, facts))
    Drives(channels, tuple(events)).write_into(folder)


def fits(sample: Sample, config: Any) -> bool:
    return bool(sample.label["event_end_row"] <= sample.facts["rows"])


def _number(sample_id: str) -> int:
    """The format numbers its events: 52 bits of a hash of the sample's id."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8]) >> 12


FORMAT = SampleFormat(suffixes=(".npz",), check=check, label=label, encode=encode, write=write, fits=fits)
