"""The intake: files of an inbox into the store, in a process of its own that has numpy and ends when nothing comes.

``python -m fl_clients.edge.samples.intake --application NAME --store FOLDER --inbox FOLDER``. A file is taken when it has
kept its size and time for a while; write under another name (``.name``, ``name.tmp``, ``name.part``) and rename to be safe.

ID.SUFFIX         one sample in the application's format          labels*.csv    id, label (or the columns of a label)
ID.json           {"id", "time", "label", "arrays": {...}}        labels*.jsonl  {"id", "label"} a line
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import signal
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl_clients.edge.samples.index import stored_limits
from fl_clients.edge.samples.store import SampleStore
from fl_core.contracts.cli import start_logging
from fl_core.contracts.errors import DataError, EnvironmentFault, FieldfleetError
from fl_core.learning.application import application

LOG = logging.getLogger(__name__)
JSON_LIMIT = 16 << 20
LABELS_LIMIT = 256 << 20
LINE_LIMIT = 64 << 10
UNFINISHED = (".tmp", ".part", ".partial", ".swp")
LABEL_SUFFIXES = (".csv", ".jsonl")


def unfinished(name: str) -> bool:
    """By convention: somebody is still writing it."""
    return name.startswith(".") or name.endswith((*UNFINISHED, "~"))


class Intake:
    """poll() again and again. settle_s: how long a file must not have changed."""

    def __init__(self, store: SampleStore, inbox: Path, *, settle_s: float = 2.0) -> None:
        self.store, self.inbox, self._settle = store, inbox, settle_s
        self._seen: dict[str, tuple[tuple[int, int, int], float]] = {}
        inbox.mkdir(parents=True, exist_ok=True)

    def poll(self) -> tuple[int, int]:
        """(files dealt with, files that wait until they are settled). Raises EnvironmentFault on a full disk."""
        now, done, waiting = time.monotonic(), 0, 0
        present: dict[str, tuple[tuple[int, int, int], float]] = {}
        for file in sorted(self.inbox.iterdir()):
            if unfinished(file.name):
                continue
            try:
                facts = file.lstat()
            except OSError:
                continue
            if stat.S_ISDIR(facts.st_mode):
                continue
            identity = (facts.st_size, facts.st_mtime_ns, facts.st_ino)
            since = self._seen.get(file.name, (None, now))
            if since[0] != identity:
                since = (identity, now)
            if now - since[1] >= self._settle and (since[1] != now or self._settle == 0):
                self._take(file, facts)
                done += 1
            else:
                present[file.name] = (identity, since[1])
                waiting += 1
        self._seen = present
        return done, waiting

    def _take(self, file: Path, facts: os.stat_result) -> None:
        """Into the store or into quarantine, and only then out of the inbox: a crash in between repeats it."""
        try:
            if not stat.S_ISREG(facts.st_mode):
                raise DataError("not a regular file")
            if file.name.lower().startswith("labels") and file.suffix.lower() in LABEL_SUFFIXES:
                self._labels(file, facts.st_size)
            elif file.suffix.lower() == ".json":
                self._message(file, facts)
            else:
                self.store.add_file(file.stem, file, facts.st_mtime)
        except (EnvironmentFault, sqlite3.OperationalError):  # a full disk: it stays where it is
            raise
        except FieldfleetError as error:
            self._put_aside(file, error.message)
        except FileNotFoundError:
            return
        except OSError as error:
            raise EnvironmentFault(f"{file}: {error}") from None
        except Exception as error:  # an application's own code, or a decoder's
            self._put_aside(file, f"{type(error).__name__}: {error}")
        else:
            file.unlink(missing_ok=True)

    def _put_aside(self, file: Path, reason: str) -> None:
        LOG.warning("samples: %s: %s", file.name, reason)
        self.store.quarantine(file.name, file, reason)

    def _message(self, file: Path, facts: os.stat_result) -> None:
        if facts.st_size > JSON_LIMIT:
            raise DataError(f"{facts.st_size:,} bytes are over the limit of {JSON_LIMIT:,}")
        table = _object(file.read_bytes())
        sample_id = table.get("id", file.stem)
        if not isinstance(sample_id, str):
            raise DataError("field 'id' is not a text")
        if "arrays" not in table:
            if "label" not in table:
                raise DataError("neither 'arrays' nor 'label' in it")
            self.store.label(sample_id, table["label"])
            return
        self.store.add(sample_id, _arrays(table["arrays"]), _time(table, facts.st_mtime), table.get("label"))

    def _labels(self, file: Path, size: int) -> None:
        if size > LABELS_LIMIT:
            raise DataError(f"{size:,} bytes are over the limit of {LABELS_LIMIT:,}")
        rows = _csv_rows(file) if file.suffix.lower() == ".csv" else _json_rows(file)
        for line, row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                self.store.label(row[0], row[1])
            except DataError as error:  # one wrong line costs that line
                LOG.warning("samples: %s line %d: %s", file.name, line, error.message)
                self.store.quarantine(f"{file.name}:{line}", None, error.message)


def _csv_rows(file: Path) -> Iterator[tuple[int, tuple[str, Any] | DataError]]:
    """One column beside the id is the label; several make it an object."""
    with file.open(newline="", encoding="utf-8-sig", errors="strict") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            names = [name for name in reader.fieldnames or [] if name != "id"]
            if "id" not in (reader.fieldnames or []) or not names:
                raise DataError("a file of labels needs the column 'id' and one more")
            for row in reader:
                if None in row or any(value is None for value in row.values()):
                    yield reader.line_num, DataError("the line has another number of fields than the first")
                    continue
                value: Any = row[names[0]] if len(names) == 1 else {name: row[name] for name in names}
                yield reader.line_num, (row["id"], value)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"not readable as CSV: {error}") from None


def _json_rows(file: Path) -> Iterator[tuple[int, tuple[str, Any] | DataError]]:
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT):
            number += 1
            if not line.strip():
                continue
            try:
                table = _object(line)
                if not isinstance(table.get("id"), str) or "label" not in table:
                    raise DataError("a line of labels is {'id': ..., 'label': ...}")
                yield number, (table["id"], table["label"])
            except DataError as error:
                yield number, error


def _object(data: bytes) -> dict[str, Any]:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(table, dict):
        raise DataError("not a JSON object")
    return table


def _arrays(table: Any) -> dict[str, np.ndarray[Any, Any]]:
    if not isinstance(table, dict) or not table:
        raise DataError("field 'arrays' is not an object of arrays")
    arrays = {}
    for name, value in table.items():
        try:
            arrays[name] = np.array(value)
        except ValueError as error:
            raise DataError(f"array {name!r}: {error}") from None
        if arrays[name].dtype.kind not in "fiubU":
            raise DataError(f"array {name!r} holds neither numbers nor texts")
    return arrays


def _time(table: dict[str, Any], fallback: float) -> float:
    value = table.get("time", fallback)
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < 2**40:
        raise DataError("field 'time' is not a number of seconds since 1970")
    return float(value)


def run(intake: Intake, stop: threading.Event, *, idle_s: float, poll_s: float) -> int:
    """Until nothing came for ``idle_s``."""
    intake.store.sweep()
    last = time.monotonic()
    while not stop.is_set():
        try:
            done, waiting = intake.poll()
        except (EnvironmentFault, sqlite3.OperationalError) as error:
            LOG.error("samples: %s", error)
            return int(EnvironmentFault.exit_code)
        if done or waiting:
            last = time.monotonic()
        elif time.monotonic() - last >= idle_s:
            break
        if not done:
            stop.wait(poll_s)
    intake.store.expire()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m fl_clients.edge.samples.intake")
    options.add_argument("--application", required=True)
    options.add_argument("--store", required=True, type=Path)
    options.add_argument("--inbox", required=True, type=Path)
    options.add_argument("--settle", type=float, default=2.0, help="seconds for which a file must not have changed")
    options.add_argument("--idle", type=float, default=15.0, help="seconds without a new file until this process ends")
    args = options.parse_args(arguments)
    start_logging(verbose=False)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides when this process ends
    with SampleStore(args.store, application(args.application), stored_limits(args.store)) as store:
        intake = Intake(store, args.inbox, settle_s=args.settle)
        return run(intake, stop, idle_s=args.idle, poll_s=max(0.05, min(1.0, args.settle / 2)))


if __name__ == "__main__":
    sys.exit(main())
