"""Native format (100-Car): a folder with ``series.npz`` and ``events.csv``; see README.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.driver_conflict import pipeline
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.learning.examples import Examples
from fl_core.storage import archive, atomic, tables

SERIES_NAME = "series.npz"
EVENTS_NAME = "events.csv"
REQUIRED = ("event_id", "vehicle_id", "event_start_row", "event_end_row", "speed_ok")
WHOLE_NUMBERS = ("event_id", "event_start_row", "event_end_row")


@dataclass(frozen=True)
class Event:
    """One recorded drive around a coded conflict.

    rows: (n, all channels) float32, as recorded; facts: the event's line of events.csv, unchanged.
    """

    event_id: int
    client: str
    rows: npt.NDArray[np.float32]
    facts: dict[str, str]

    @property
    def conflict(self) -> tuple[int, int]:
        """First and last row of the coded conflict, as offsets inside the event."""
        return int(self.facts["event_start_row"]), int(self.facts["event_end_row"])

    @property
    def usable(self) -> bool:
        """The protocol's events: a speed channel that is not stuck, and at least one window."""
        return self.facts["speed_ok"] == "1" and len(self.rows) >= pipeline.WINDOW_ROWS


@dataclass(frozen=True)
class Drives:
    """A data set: events of many vehicles. ``channels`` names the columns of every event's rows."""

    channels: tuple[str, ...]
    events: tuple[Event, ...]

    def client_ids(self) -> tuple[str, ...]:
        """The vehicles that have at least one usable event."""
        return tuple(sorted({e.client for e in self.events if e.usable}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        return type(self)(self.channels, tuple(e for e in self.events if e.client in wanted))

    def write(self, folder: Path) -> None:
        with atomic.new_folder(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """``write`` into a folder that exists."""
        sizes = np.array([len(e.rows) for e in self.events], np.int64)
        row0 = np.cumsum(sizes) - sizes
        rows = [e.rows for e in self.events] or [np.zeros((0, len(self.channels)), np.float32)]
        np.savez_compressed(
            folder / SERIES_NAME,
            X=np.concatenate(rows),
            channels=np.array(self.channels),
            event_id=np.array([e.event_id for e in self.events], np.int64),
            row0=row0,
            n_rows=sizes,
        )
        (folder / EVENTS_NAME).write_text(self._table(row0), encoding="utf-8")

    def _table(self, row0: npt.NDArray[np.int64]) -> str:
        out = io.StringIO()
        names = list(self.events[0].facts) if self.events else [*REQUIRED]
        names += [n for n in ("n_rows", "row0") if n not in names]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        for event, first in zip(self.events, row0, strict=True):
            writer.writerow({**event.facts, "n_rows": str(len(event.rows)), "row0": str(first)})
        return out.getvalue()

    def examples(self, config: Any) -> Examples:
        """The labelled windows of the usable events; ``window`` is (N, CONTEXT_ROWS, C) raw values with NaN.

        Columns beside the usual ones: event_id; start_row, end_row (end not counted) inside the event;
        full_context: the whole 8 s lie inside the record; trainable: the same (see augment.py); scored: the window lies
        on the protocol's grid, the others (data.training_hop) are there to be learned from.
        """
        column = [self.channels.index(name) for name in pipeline.NAMES]
        d = config.data
        parts = [windows(event, column, d.training_hop) for event in self.events if event.usable]
        parts = [part for part in parts if len(part)] or [_no_windows()]
        window = np.concatenate([p.inputs["window"] for p in parts])
        window[:, :, [pipeline.index(n) for sensor in d.missing_sensors for n in pipeline.SENSORS[sensor]]] = np.nan
        return Examples(
            {"window": window},
            np.concatenate([p.targets for p in parts]),
            {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
        )


def prepared(event: Event, column: list[int]) -> npt.NDArray[np.float32]:
    """(rows, C): the event's readings of the pipeline's channels, NaN where they are not usable."""
    rows = pipeline.clean(event.rows[:, column])
    if event.facts.get("accel_ok", "1") != "1":
        rows[:, [pipeline.index(name) for name in pipeline.ACCELERATIONS]] = np.nan
    return rows


def windows(event: Event, column: list[int], hop: int = pipeline.HOP_ROWS) -> Examples:
    """The labelled windows of one event, on the protocol's grid and every ``hop`` rows between.

    ``column`` finds the pipeline's channels among those recorded.
    """
    rows = prepared(event, column)
    starts = pipeline.window_starts(len(rows), hop)
    labels = pipeline.window_labels(starts, *event.conflict)
    labels = np.where(labels == 1, pipeline.incident_label(event.facts.get("incident_type", "")), labels)
    scored = starts % pipeline.HOP_ROWS == 0
    kept = (labels >= 0) & (scored | (starts + pipeline.WINDOW_ROWS >= pipeline.CONTEXT_ROWS))
    starts, labels, scored = starts[kept], labels[kept], scored[kept]
    ends = starts + pipeline.WINDOW_ROWS
    full = ends >= pipeline.CONTEXT_ROWS
    count = len(starts)
    columns = {
        "example_id": np.array([f"{event.event_id}/{start}" for start in starts], dtype=np.str_),
        "client": np.full(count, event.client),
        "group": np.full(count, str(event.event_id)),
        "event_id": np.full(count, event.event_id, np.int64),
        "start_row": starts,
        "end_row": ends,
        "full_context": full,
        "trainable": full,
        "scored": scored,
    }
    return Examples({"window": pipeline.contexts(rows, ends)}, labels.astype(np.int64), columns)


def _no_windows() -> Examples:
    empty = np.zeros((0, len(pipeline.CHANNELS)), np.float32)
    facts = {"event_start_row": "0", "event_end_row": "0"}
    return windows(Event(0, "", empty, facts), list(range(len(pipeline.CHANNELS))))


def read(path: Path) -> Drives:
    """Raises DataError naming the file and the array, column, line or event at fault."""
    series = path / SERIES_NAME
    table = path / EVENTS_NAME
    arrays = archive.read_npz(series, required=("X", "channels", "event_id", "row0", "n_rows"))
    channels = checked_channels(series, arrays)
    places = _places(series, arrays)
    facts = _facts(table)
    for event_id in sorted(set(places) ^ set(facts)):
        raise DataError(f"{path}: event {event_id} is in only one of {SERIES_NAME} and {EVENTS_NAME}")
    x = arrays["X"].astype(np.float32)
    events = []
    for event_id, (row0, count) in places.items():
        entry = facts[event_id]
        if entry.get("n_rows", str(count)) != str(count):
            raise DataError(f"{table}: event {event_id} has n_rows {entry['n_rows']}, {SERIES_NAME} has {count}")
        first, last = int(entry["event_start_row"]), int(entry["event_end_row"])
        if not 0 <= first <= last <= count:
            raise DataError(f"{table}: event {event_id}: conflict rows {first} to {last} do not fit its {count} rows")
        events.append(Event(event_id, f"vehicle-{entry['vehicle_id']}", x[row0 : row0 + count], entry))
    return Drives(channels, tuple(events))


def checked_channels(file: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> tuple[str, ...]:
    x, channels = arrays["X"], tuple(str(c) for c in np.atleast_1d(arrays["channels"]))
    if x.ndim != 2 or x.dtype.kind not in "fiu" or x.shape[1] != len(channels):
        raise DataError(f"{file}: X is {x.dtype}{x.shape}, expected numbers of shape (rows, {len(channels)})")
    for name in pipeline.NAMES:
        if name not in channels:
            raise DataError(f"{file}: channel {name!r} is missing", remedy=f"it holds: {', '.join(channels)}")
    return channels


def _places(file: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> dict[int, tuple[int, int]]:
    """event_id -> (first row, number of rows), every one inside X."""
    ids, row0, count = arrays["event_id"], arrays["row0"], arrays["n_rows"]
    for name, array in (("event_id", ids), ("row0", row0), ("n_rows", count)):
        if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != len(ids):
            raise DataError(f"{file}: array {name!r} must hold one whole number for each event")
    places: dict[int, tuple[int, int]] = {}
    for event_id, first, rows in zip(ids.tolist(), row0.tolist(), count.tolist(), strict=True):
        if first < 0 or rows < 1 or first + rows > len(arrays["X"]):
            raise DataError(
                f"{file}: event {event_id} takes rows {first} to {first + rows}, X has {len(arrays['X'])}",
                remedy="the file may be cut short: copy it again",
            )
        if event_id in places:
            raise DataError(f"{file}: event {event_id} occurs twice")
        places[event_id] = (first, rows)
    return places


def _facts(file: Path) -> dict[int, dict[str, str]]:
    facts: dict[int, dict[str, str]] = {}
    for line, row in enumerate(tables.read_csv(file, required=REQUIRED), start=2):
        for name in WHOLE_NUMBERS:
            if not row[name].isdecimal() or len(row[name]) > 18:
                raise DataError(f"{file}: line {line}: {name} is {row[name]!r}, not a whole number")
        for name in ("speed_ok", "accel_ok"):
            if row.get(name, "1") not in ("0", "1"):
                raise DataError(f"{file}: line {line}: {name} is {row[name]!r}, not 0 or 1")
        try:
            checked_name(f"vehicle-{row['vehicle_id']}", "vehicle")
        except InputError as error:
            raise DataError(f"{file}: line {line}: {error.message}", remedy=error.remedy) from None
        event_id = int(row["event_id"])
        if event_id in facts:
            raise DataError(f"{file}: line {line}: event {event_id} occurs twice")
        facts[event_id] = row
    return facts
