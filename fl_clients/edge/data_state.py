"""How much data this device has for each application, and how old the newest is: from the sample stores, or from the data
folders' times and what the training worker counted last.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_core.contracts.device_state import LARGEST, DataState
from fl_core.contracts.names import NAME_PATTERN
from fl_core.storage import atomic

LOG = logging.getLogger(__name__)
Summaries = Callable[[], Mapping[str, Mapping[str, Any]]]
LOOK_EVERY_S = 300.0  # at a folder's files
ENTRIES_LIMIT = 20_000


class DataStates:
    """Callable: application -> DataState. folders: application -> folder, "" where the device names no application.

    file: keeps the counts across restarts, since an agent that has not trained yet cannot count. summaries(): of the
    sample stores. clock: seconds since 1970.
    """

    def __init__(
        self, folders: Mapping[str, Path], file: Path, summaries: Summaries, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._folders, self._file, self._summaries, self._clock = dict(folders), file, summaries, clock
        self._lock = threading.Lock()
        self._counts = self._load()
        self._newest: dict[str, tuple[float, float | None]] = {}

    def __call__(self) -> dict[str, DataState]:
        stores, now = self._summaries(), self._clock()
        with self._lock:
            names = {name for name in (*self._folders, *self._counts) if name} - stores.keys()
            found = {name: DataState(num_examples=self._counts.get(name), age_s=self._age(name, now)) for name in names}
        return {**found, **of_samples(stores, now)}

    def counted(self, application: str, number: int) -> None:
        """The training worker has read this application's data."""
        with self._lock:
            if self._counts.get(application) == number:
                return
            self._counts[application] = number
            try:
                atomic.write_json(self._file, self._counts)
            except OSError as error:  # a full disk: it holds until the agent ends
                LOG.warning("%s: not written: %s", self._file, error)

    def _age(self, name: str, now: float) -> float | None:
        folder = self._folders.get(name, self._folders.get(""))
        if folder is None:
            return None
        looked, newest = self._newest.get(name, (-LOOK_EVERY_S, None))
        if not 0 <= now - looked < LOOK_EVERY_S:
            newest = newest_time(folder)
            self._newest[name] = (now, newest)
        return None if newest is None else max(0.0, now - newest)

    def _load(self) -> dict[str, int]:
        try:
            table = json.loads(self._file.read_text(encoding="utf-8"))
            return {name: n for name, n in table.items() if usable(name, n)}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}


def usable(name: Any, number: Any) -> bool:
    """An application's name and a number of examples."""
    named = isinstance(name, str) and NAME_PATTERN.fullmatch(name) is not None
    return named and type(number) is int and 0 <= number <= LARGEST


def newest_time(folder: Path) -> float | None:
    """When the newest of its files was changed, seconds since 1970; of the first ENTRIES_LIMIT where there are more."""
    newest: float | None = None
    left = ENTRIES_LIMIT
    for where, _, files in os.walk(folder):
        for name in files[:left]:
            try:
                changed = os.stat(os.path.join(where, name), follow_symlinks=False).st_mtime
            except OSError:
                continue
            newest = changed if newest is None else max(newest, changed)
        left -= len(files)
        if left <= 0:
            break
    return newest


def of_samples(summaries: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, DataState]:
    """From the sample stores' summaries. now: seconds since 1970. Samples without a label do not train."""
    return {
        name: DataState(
            num_examples=found["labelled"],
            age_s=None if found["newest"] is None else max(0.0, now - found["newest"]),
        )
        for name, found in summaries.items()
    }
