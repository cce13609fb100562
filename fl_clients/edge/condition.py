"""This device's condition over time: what the server should hear of it, and whether the owner's policy lets it train."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_clients.edge.policy import Decision, PolicySettings, decide
from fl_core.contracts.device_state import DataState, DeviceState
from fl_core.storage import atomic

LOG = logging.getLogger(__name__)
FRESH_S = 2.0  # a reading serves all who ask within this time
BURST, REFILL_S = 6, 600.0  # messages about changes: six at once, then one in ten minutes
BATTERY_STEP, TEMPERATURE_STEP, SHARE_STEP = 0.05, 5.0, 0.25
NOTE_EVERY_S = 30.0  # training time that a power cut may forget


class Condition:
    """Thread-safe. probe() -> the state by the device's own means; skew(): the clock's error in seconds, if known;
    data(): the applications' data; counted(application, number): of examples, by the training worker. folder: where the
    day's training time is kept. clock, now: for tests.
    """

    def __init__(
        self,
        policy: PolicySettings,
        probe: Callable[[], DeviceState],
        folder: Path,
        *,
        skew: Callable[[], float | None] = lambda: None,
        data: Callable[[], Mapping[str, DataState]] = dict,
        counted: Callable[[str, int], None] = lambda application, number: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now().astimezone(),
    ) -> None:
        self.policy = policy
        self._probe, self._skew, self._data, self._clock, self._now = probe, skew, data, clock, now
        self.counted = counted
        self._lock = threading.RLock()
        self._read: DeviceState | None = None
        self._read_at = 0.0
        self._waiting = False
        self._told: DeviceState | None = None
        self._bucket = Bucket(BURST, REFILL_S, clock)
        self.day = TrainingDay(folder / "training-day.json")

    def state(self) -> DeviceState:
        with self._lock:
            return dataclasses.replace(self._measured(), waiting=self.decide().reason)

    def facts(self) -> dict[str, Any]:
        """For the server."""
        with self._lock:
            state = self.state()
            self._told = self._told or state
            return rounded(state).to_table()

    def news(self) -> bool:
        """Whether the server should hear of a change now: it matters, and not too much was said lately."""
        with self._lock:
            state = self.state()
            if self._told is None or not matters(self._told, state) or not self._bucket.take():
                return False
            self._told = state
            return True

    def decide(self) -> Decision:
        """Whether training is allowed now."""
        if not self.policy.restricts:
            return Decision()
        with self._lock:
            now = self._now()
            found = decide(self.policy, self._measured(), now, self.day.seconds(now), waiting=self._waiting)
            if not found.allowed and not self._waiting:
                LOG.info("agent: no training now: %s", found.reason)
            self._waiting = not found.allowed
            return found

    def trained(self, seconds: float) -> None:
        """The worker was at work for so long."""
        if self.policy.max_train_s_per_day:
            with self._lock:
                self.day.add(self._now(), seconds)

    def close(self) -> None:
        with self._lock:
            self.day.save()

    def _measured(self) -> DeviceState:
        if self._read is None or self._clock() - self._read_at >= FRESH_S:
            measured, data = self._probe(), dict(self._data())
            counts = [held.num_examples for held in data.values() if held.num_examples is not None]
            self._read = dataclasses.replace(
                measured,
                data={**measured.data, **data},
                num_examples=sum(counts) if counts else measured.num_examples,
                clock_skew_s=self._skew(),
            )
            self._read_at = self._clock()
        return self._read


class Bucket:
    """``size`` at once, then one in ``refill_s`` seconds."""

    def __init__(self, size: int, refill_s: float, clock: Callable[[], float]) -> None:
        self._size, self._refill, self._clock = size, refill_s, clock
        self._left, self._at = float(size), clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._at) / self._refill)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class TrainingDay:
    """Seconds of training on the present local day, on disk now and then: a restart does not begin a new day."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._day, self._seconds = self._load()
        self._unsaved = 0.0

    def seconds(self, now: datetime.datetime) -> float:
        return self._seconds if self._day == now.date().isoformat() else 0.0

    def add(self, now: datetime.datetime, seconds: float) -> None:
        self._seconds, self._day = self.seconds(now) + max(0.0, seconds), now.date().isoformat()
        self._unsaved += seconds
        if self._unsaved >= NOTE_EVERY_S:
            self.save()

    def save(self) -> None:
        if not self._unsaved:
            return
        try:
            atomic.write_json(self._file, {"day": self._day, "seconds": round(self._seconds, 3)})
            self._unsaved = 0.0
        except OSError as error:  # a full disk: it holds until the agent ends
            LOG.warning("%s: not written: %s", self._file, error)

    def _load(self) -> tuple[str, float]:
        try:
            table = json.loads(self._file.read_text(encoding="utf-8"))
            return str(table["day"]), max(0.0, float(table["seconds"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "", 0.0


def matters(before: DeviceState, after: DeviceState) -> bool:
    """Whether the difference may change what a server decides."""
    for name in ("charging", "network", "metered", "group", "tags"):
        if getattr(before, name) != getattr(after, name):
            return True
    return (
        bool(before.waiting) != bool(after.waiting)
        or _moved(before.battery_level, after.battery_level, BATTERY_STEP)
        or _moved(before.temperature_c, after.temperature_c, TEMPERATURE_STEP)
        or _grew(before.free_storage_bytes, after.free_storage_bytes)
        or _grew(before.num_examples, after.num_examples)
        or before.data.keys() != after.data.keys()
        or any(_grew(before.data[name].num_examples, held.num_examples) for name, held in after.data.items())
    )


def _moved(before: float | None, after: float | None, step: float) -> bool:
    if before is None or after is None:
        return before is not after
    return abs(after - before) >= step - 1e-9


def _grew(before: int | None, after: int | None) -> bool:
    if before is None or after is None:
        return before is not after
    return abs(after - before) > SHARE_STEP * max(before, after)


def rounded(state: DeviceState) -> DeviceState:
    """As exact as anyone needs, so that the same condition is the same message."""

    def at(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    return dataclasses.replace(
        state,
        battery_level=at(state.battery_level, 2),
        temperature_c=at(state.temperature_c, 1),
        data_age_s=at(state.data_age_s, 0),
        clock_skew_s=at(state.clock_skew_s, 1),
        data={name: DataState(num_examples=d.num_examples, age_s=at(d.age_s, 0)) for name, d in state.data.items()},
    )
