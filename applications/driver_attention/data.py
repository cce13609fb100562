"""Native format: a folder with ``clips.csv``, ``media.csv`` and the files that they name; see README.md."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.driver_attention import media, pipeline
from applications.driver_attention.config import VIEWS, Config
from applications.driver_attention.media import Stream
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.learning.examples import Examples
from fl_core.storage import atomic, tables

CLIPS_NAME, MEDIA_NAME = "clips.csv", "media.csv"
KINEMATICS = "kinematics"  # the view's name of the motion's table
MAX_BYTES = 16 * 2**30  # of all frames of all clips together


@dataclass(frozen=True)
class Motion:
    """times: (n,) s, ascending; values: (n, C) float32, NaN where there is no sample."""

    times: npt.NDArray[np.float64]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """What one vehicle recorded on one clock. views: those whose camera gave frames."""

    name: str
    views: dict[str, Stream]
    motion: Motion | None


@dataclass(frozen=True)
class Clip:
    """A moment that is judged: the frames that end at ``end_s``. conflict: 0 or 1, state: a number of ``STATES``; NaN = not known."""

    clip_id: str
    recording: str
    client: str
    group: str
    end_s: float
    conflict: float
    state: float


@dataclass(frozen=True)
class Drives:
    """A data set: clips, and the recordings that they are cut from."""

    recordings: dict[str, Recording]
    clips: tuple[Clip, ...]

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted({clip.client for clip in self.clips}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        clips = tuple(clip for clip in self.clips if clip.client in wanted)
        used = {clip.recording for clip in clips}
        return type(self)({k: v for k, v in self.recordings.items() if k in used}, clips)

    def write(self, folder: Path) -> None:
        with atomic.new_folder(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """``write`` into a folder that exists. Frames that are files become arrays of the frames as they are."""
        rows: list[list[str]] = []
        for name, recording in self.recordings.items():
            (folder / name).mkdir()
            for view, stream in recording.views.items():
                np.save(folder / name / f"{view}.npy", whole(stream), allow_pickle=False)
                write_table(folder / name / f"{view}.csv", ["time_s"], [[repr(float(t))] for t in stream.times])
                rows.append([name, view, f"{name}/{view}.npy", f"{name}/{view}.csv"])
            if recording.motion is not None:
                lines = zip(recording.motion.times, recording.motion.values, strict=True)
                write_table(
                    folder / name / f"{KINEMATICS}.csv",
                    ["time_s", *pipeline.NAMES],
                    [[repr(float(t)), *("" if np.isnan(v) else repr(float(v)) for v in row)] for t, row in lines],
                )
                rows.append([name, KINEMATICS, f"{name}/{KINEMATICS}.csv", ""])
        write_table(folder / MEDIA_NAME, ["recording", "view", "file", "timestamps"], rows)
        write_table(
            folder / CLIPS_NAME,
            ["clip_id", "recording", "vehicle_id", "group", "end_s", "conflict", "state"],
            [
                [
                    *(c.clip_id, c.recording, c.client.removeprefix("vehicle-"), c.group, repr(c.end_s)),
                    "" if math.isnan(c.conflict) else str(int(c.conflict)),
                    "" if math.isnan(c.state) else pipeline.STATES[int(c.state)],
                ]
                for c in self.clips
            ],
        )

    def examples(self, config: Any) -> Examples:
        """Frames, masks and motion of every clip; views and motion that the configuration takes as absent are left out."""
        cfg: Config = config
        d, n = cfg.data, len(self.clips)
        shape = (n, len(VIEWS), d.frames, d.height, d.width)
        if math.prod(shape) > MAX_BYTES:
            raise DataError(
                f"{n} clips of {math.prod(shape[1:]):,} bytes take over {MAX_BYTES:,} bytes",
                remedy="lower data.height and data.width, or split the data set",
            )
        frames = np.zeros(shape, np.uint8)
        present = np.zeros(shape[:3], np.float32)
        kinematics = np.full((n, d.frames, len(pipeline.CHANNELS)), np.nan, np.float32)
        for name in dict.fromkeys(clip.recording for clip in self.clips):
            rows = np.array([i for i, clip in enumerate(self.clips) if clip.recording == name])
            self._fill(cfg, self.recordings[name], rows, frames, present, kinematics)
        columns = {
            "example_id": np.array([c.clip_id for c in self.clips], dtype=np.str_),
            "client": np.array([c.client for c in self.clips], dtype=np.str_),
            "group": np.array([c.group for c in self.clips], dtype=np.str_),
            "recording": np.array([c.recording for c in self.clips], dtype=np.str_),
        }
        targets = np.array([[c.conflict, c.state] for c in self.clips], np.float32).reshape(n, 2)
        return Examples({"frames": frames, "present": present, "kinematics": kinematics}, targets, columns)

    def _fill(
        self, cfg: Config, recording: Recording, rows: npt.NDArray[np.int64], frames: Any, present: Any, kinematics: Any
    ) -> None:
        """One recording's part of the inputs, in place."""
        d = cfg.data
        times = np.concatenate([pipeline.sampling_times(cfg, self.clips[i].end_s) for i in rows])
        within = 0.5 / d.rate_hz
        for view, stream in recording.views.items():
            if view in d.missing_views:
                continue
            found = pipeline.nearest(times, stream.times, within)
            needed, place = np.unique(found[found >= 0], return_inverse=True)
            pixels = np.zeros((len(times), d.height, d.width), np.uint8)
            pixels[found >= 0] = stream.frames(needed, d.height, d.width)[place]
            frames[rows, VIEWS.index(view)] = pixels.reshape(len(rows), d.frames, d.height, d.width)
            present[rows, VIEWS.index(view)] = (found >= 0).reshape(len(rows), d.frames)
        if recording.motion is not None and not d.missing_kinematics:
            found = pipeline.nearest(times, recording.motion.times, within)
            values = np.where((found >= 0)[:, None], pipeline.clean(recording.motion.values)[found], np.nan)
            kinematics[rows] = values.reshape(len(rows), d.frames, -1)


def whole(stream: Stream) -> media.Frames:
    """Every frame, as it is where all are of one size."""
    if isinstance(stream.source, np.ndarray):
        return stream.source
    return np.stack(list(media.opened(stream.source, np.arange(len(stream.times)))))


def write_table(path: Path, header: list[str], rows: list[list[str]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.write_text(out.getvalue(), encoding="utf-8")


def read(path: Path) -> Drives:
    """Raises DataError naming the file, the column or the line. Frames are decoded later, by ``examples``.

    A folder with ``labels.csv`` in the place of ``clips.csv`` is read as one camera on the driver (``cabin.py``).
    """
    from applications.driver_attention import cabin

    if not (path / CLIPS_NAME).is_file() and (path / cabin.TABLE_NAME).is_file():
        return Drives(*cabin.read(path))
    clips = read_clips(path / CLIPS_NAME)
    recordings = read_media(path, {clip.recording for clip in clips})
    for clip in clips:
        if clip.recording not in recordings:
            raise DataError(
                f"{path / MEDIA_NAME}: nothing of the recording {clip.recording!r} of clip {clip.clip_id!r}"
            )
    return Drives(recordings, tuple(clips))


def read_clips(table: Path) -> list[Clip]:
    found: list[Clip] = []
    seen: set[str] = set()
    owner: dict[str, str] = {}
    for line, row in enumerate(
        tables.read_csv(table, required=("clip_id", "recording", "vehicle_id", "end_s")), start=2
    ):
        place = f"{table}: line {line}"
        name, vehicle = row["recording"], row["vehicle_id"]
        try:
            checked_name(name, "recording")
            checked_name(f"vehicle-{vehicle}", "vehicle")
        except InputError as error:
            raise DataError(f"{place}: {error.message}", remedy=error.remedy) from None
        if not row["clip_id"] or row["clip_id"] in seen:
            raise DataError(f"{place}: clip_id {row['clip_id']!r} is empty or there twice")
        if owner.setdefault(name, vehicle) != vehicle:
            raise DataError(f"{place}: recording {name!r} is of vehicle {owner[name]!r} in an earlier line")
        seen.add(row["clip_id"])
        found.append(
            Clip(
                row["clip_id"], name, f"vehicle-{vehicle}", row.get("group", "") or name, number(place, "end_s", row["end_s"]),
                one_of(place, "conflict", row.get("conflict", ""), ("0", "1")),
                one_of(place, "state", row.get("state", ""), pipeline.STATES),
            )
        )  # fmt: skip
    return found


def read_media(path: Path, wanted: set[str]) -> dict[str, Recording]:
    table = path / MEDIA_NAME
    views: dict[str, dict[str, Stream]] = {}
    motions: dict[str, Motion] = {}
    for line, row in enumerate(tables.read_csv(table, required=("recording", "view", "file")), start=2):
        place, name, view = f"{table}: line {line}", row["recording"], row["view"]
        if view not in (*VIEWS, KINEMATICS):
            raise DataError(f"{place}: view {view!r} is not known", remedy=f"known: {', '.join((*VIEWS, KINEMATICS))}")
        if name not in wanted:
            continue
        if view in views.setdefault(name, {}) or (view == KINEMATICS and name in motions):
            raise DataError(f"{place}: {view} of recording {name!r} is there twice")
        file = inside(path, place, row["file"])
        if view == KINEMATICS:
            motions[name] = read_motion(file)
        else:
            views[name][view] = Stream(read_times(path, place, row, file), file)
    return {name: Recording(name, views[name], motions.get(name)) for name in views}


def read_times(path: Path, place: str, row: dict[str, str], file: Path) -> media.Times:
    """From the table that ``timestamps`` names, else from ``start_s`` and ``rate_hz``; ascending, one a frame."""
    if not file.exists():
        raise DataError(f"{place}: {file}: no such file or folder")
    count = media.count(file)
    if row.get("timestamps"):
        table = inside(path, place, row["timestamps"])
        times = np.array(
            [number(f"{table}", "time_s", r["time_s"]) for r in tables.read_csv(table, required=("time_s",))]
        )
    else:
        if not row.get("rate_hz"):
            raise DataError(
                f"{place}: when the frames of {row['file']} were taken is not said",
                remedy="name a table with the column time_s in 'timestamps', or give start_s and rate_hz",
            )
        if count is None:
            raise DataError(
                f"{place}: the frames of a video need 'timestamps'", remedy="a table with the column time_s"
            )
        rate = number(place, "rate_hz", row["rate_hz"])
        if not rate > 0:
            raise DataError(f"{place}: rate_hz is {row['rate_hz']}, expected a number above 0")
        times = number(place, "start_s", row.get("start_s") or "0") + np.arange(count) / rate
    if count is not None and len(times) != count:
        raise DataError(f"{place}: {len(times)} timestamps for {count} frames of {row['file']}")
    if (np.diff(times) <= 0).any():
        raise DataError(f"{place}: the timestamps of {row['file']} do not ascend")
    return times


def read_motion(file: Path) -> Motion:
    """``time_s`` and any of the channels; empty cells and channels that are not there are missing."""
    rows = tables.read_csv(file, required=("time_s",))
    times = np.array([number(str(file), "time_s", row["time_s"]) for row in rows])
    if (np.diff(times) <= 0).any():
        raise DataError(f"{file}: time_s does not ascend")
    values = np.full((len(rows), len(pipeline.NAMES)), np.nan, np.float32)
    for k, name in enumerate(pipeline.NAMES):
        if name in rows[0]:
            for i, row in enumerate(rows):
                if row[name].strip():
                    values[i, k] = number(str(file), name, row[name])
    return Motion(times, values)


def number(place: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{place}: {column} is {text!r}, not a finite number")
    return value


def one_of(place: str, column: str, text: str, names: tuple[str, ...]) -> float:
    """The number of the name; NaN for an empty cell."""
    if not text:
        return math.nan
    if text not in names:
        raise DataError(
            f"{place}: {column} is {text!r}", remedy=f"one of: {', '.join(names)}, or empty where not known"
        )
    return float(names.index(text))


def inside(path: Path, place: str, name: str) -> Path:
    """Raises DataError when the file lies outside the data set, by its name or by a link."""
    pure = PurePosixPath(name)
    file = path / name
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not file.resolve().is_relative_to(path.resolve()):
        raise DataError(
            f"{place}: {name!r} is not a file inside the data set's folder",
            remedy="write paths relative to it, without '..'",
        )
    return file
