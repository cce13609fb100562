"""One camera on the driver and nothing else: ``labels.csv`` (file, label, frame, block), labels awake and drowsy.

A single view with unknown conflicts; frames are taken as ``RATE_HZ`` a second. Each block is a recording and, for want of
several vehicles, a client.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from applications.driver_attention import media, pipeline
from fl_core.contracts.errors import DataError
from fl_core.storage import tables

if TYPE_CHECKING:
    from applications.driver_attention.data import Clip, Recording

TABLE_NAME = "labels.csv"
RATE_HZ = 5.0
LABELS = {"awake": "attentive", "drowsy": "drowsy"}
STEP = 3  # frames from one clip's end to the next one's
LOOK_BACK = 5  # frames whose labels decide a clip's state; it is left open where they do not agree


def read(path: Path) -> tuple[dict[str, Recording], tuple[Clip, ...]]:
    """Raises DataError naming the line."""
    from applications.driver_attention.data import Clip, Recording, inside

    table = path / TABLE_NAME
    blocks: dict[int, list[tuple[int, Path, float]]] = {}
    for line, row in enumerate(tables.read_csv(table, required=("file", "label", "frame", "block")), start=2):
        if row["label"] not in LABELS:
            raise DataError(f"{table}: line {line}: label {row['label']!r}", remedy=f"known: {', '.join(LABELS)}")
        if not (row["frame"].isdecimal() and row["block"].isdecimal()):
            raise DataError(f"{table}: line {line}: frame and block must be whole numbers")
        file = inside(path, f"{table}: line {line}", row["file"])
        state = float(pipeline.STATES.index(LABELS[row["label"]]))
        blocks.setdefault(int(row["block"]), []).append((int(row["frame"]), file, state))
    recordings, clips = {}, []
    for block, entries in sorted(blocks.items()):
        entries.sort()
        name = f"block-{block}"
        frames, files, states = zip(*entries, strict=True)
        times = np.array(frames, np.float64) / RATE_HZ
        if (np.diff(times) <= 0).any():
            raise DataError(f"{table}: block {block} holds a frame twice")
        recordings[name] = Recording(name, {"cabin": media.Stream(times, tuple(files))}, None)
        for i in range(LOOK_BACK - 1, len(entries), STEP):
            last = states[i - LOOK_BACK + 1 : i + 1]
            state = last[0] if len(set(last)) == 1 else math.nan
            clip = Clip(f"{name}/{frames[i]}", name, f"vehicle-{name}", name, float(times[i]), math.nan, state)
            clips.append(clip)
    return recordings, tuple(clips)
