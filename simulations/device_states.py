"""Device states for simulated federations, from a trace or from a generator, on a virtual clock of so many seconds a round.

The choice itself is the server's own StateSelector; only where states and time come from differs.
"""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fl_core.contracts.device_state import DeviceState, from_table
from fl_core.contracts.errors import DataError, IntegrityError
from fl_core.contracts.sections import SelectionConfig
from fl_core.learning import seeding
from fl_server.history import RoundRecord
from fl_server.selection import Choice, StateSelector

GENERATED = "generated"
ROUND_S = 3_600.0
UNKNOWN = DeviceState()
STEP_S, DAY_S = 600.0, 86_400.0
TRAINING_COST = 0.03  # of the battery's charge, each time


class StateSource(Protocol):
    """States over a virtual time in seconds; time never runs back."""

    def states(self, time: float) -> Mapping[str, DeviceState]: ...

    def trained(self, names: Sequence[str], time: float, cost: float = TRAINING_COST) -> None:
        """These devices were asked at this time, which costs them this share of their charge."""


class SimulatedSelector:
    """The server's selection over simulated devices. A device without a network is offline: nobody knows of it.

    clock: the time in seconds; None = each round takes ``round_s``.
    """

    def __init__(
        self,
        settings: SelectionConfig,
        source: StateSource,
        *,
        seed: int,
        application: str,
        round_s: float = ROUND_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._source, self._round_s, self._clock, self._now = source, round_s, clock, 0.0
        self._inner = StateSelector(
            settings,
            lambda: source.states(self._now),
            seed=seed,
            application=application,
            clock=lambda: self._now,
        )

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        self._now = self._time(round)
        states = self._source.states(self._now)
        online = [name for name in names if states.get(name, UNKNOWN).network != "none"]
        return self._inner.choose(online, count, round=round)

    def note(self, record: RoundRecord) -> None:
        if self._clock is None:  # with a clock, devices train when they train
            self._source.trained([*record.clients, *record.refused, *record.late], self._time(record.round))
        self._inner.note(record)

    def _time(self, round: int) -> float:
        return self._clock() if self._clock is not None else (round - 1) * self._round_s


class KnownData:
    """Nothing is known of the devices but how many examples each has."""

    def __init__(self, examples: Mapping[str, int]) -> None:
        self._states = {name: DeviceState(num_examples=number) for name, number in examples.items()}

    def states(self, time: float) -> Mapping[str, DeviceState]:
        return self._states

    def trained(self, names: Sequence[str], time: float, cost: float = TRAINING_COST) -> None:
        """That changes nothing here."""


class TraceStates:
    """What a trace says: each of its rows is a device's whole state from its time on. Before its first, nothing is known.

    examples: of each client, where the trace does not say. Raises DataError: a wrong row with its number, or no device
    of the trace is one of ``examples``.
    """

    def __init__(self, file: Path, examples: Mapping[str, int]) -> None:
        self._times: dict[str, list[float]] = {}
        self._states: dict[str, list[DeviceState]] = {}
        self._known = KnownData(examples).states(0.0)
        for time, device, state in sorted(read_trace(file), key=lambda row: row[0]):
            if state.num_examples is None and device in examples:
                state = replace(state, num_examples=examples[device])
            self._times.setdefault(device, []).append(time)
            self._states.setdefault(device, []).append(state)
        if not set(self._times) & set(examples):
            raise DataError(
                f"{file}: none of its devices is a client of this data set",
                remedy=f"clients: {', '.join(sorted(examples)[:10])}",
            )

    def states(self, time: float) -> Mapping[str, DeviceState]:
        found = dict(self._known)
        for device, times in self._times.items():
            at = bisect_right(times, time)
            if at:
                found[device] = self._states[device][at - 1]
        return found

    def trained(self, names: Sequence[str], time: float, cost: float = TRAINING_COST) -> None:
        """A trace happened as it is written."""


def read_trace(file: Path) -> Iterator[tuple[float, str, DeviceState]]:
    """(seconds, device, state) of each row of a .csv with a header, or else of JSON lines."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            if file.suffix.lower() == ".csv":
                rows: Iterator[Any] = ({k: cell(v) for k, v in row.items() if v} for row in csv.DictReader(stream))
            else:
                rows = (json.loads(line) for line in stream if line.strip())
            for number, row in enumerate(rows, start=1):
                yield _row(row, f"{file}: row {number}")
    except OSError as error:
        raise DataError(f"{file}: not readable: {error.strerror}") from None
    except (ValueError, AttributeError, csv.Error, RecursionError) as error:
        raise DataError(f"{file}: not a trace: {error}", remedy="JSON lines, or .csv with a header") from None
    except IntegrityError as error:
        raise DataError(error.message) from None


def _row(row: Any, origin: str) -> tuple[float, str, DeviceState]:
    if not isinstance(row, dict):
        raise IntegrityError(f"{origin}: not a table")
    fields = dict(row)
    time, device = fields.pop("time", None), fields.pop("device", None)
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not math.isfinite(time) or time < 0:
        raise IntegrityError(f"{origin}: time = {time!r} is not a number of seconds")
    if device is None:
        raise IntegrityError(f"{origin}: device is missing")
    return float(time), str(device), from_table({**fields, "seen_at": float(time)}, origin=origin)


def cell(text: str) -> Any:
    """A cell of a .csv: a number, true or false, a list with ``;``, or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return [part for part in text.split(";") if part] if ";" in text else text


class GeneratedStates:
    """Seeded days of devices: at home for some hours of each day on a charger and Wi-Fi, else on battery and a metered
    cellular network, sometimes without any. Training costs charge.
    """

    def __init__(self, examples: Mapping[str, int], seed: int) -> None:
        self._names = sorted(examples)
        self._examples = dict(examples)
        rngs = [seeding.generator(seed, "device-states", name) for name in self._names]
        self._home_from = np.array([r.uniform(17, 23) for r in rngs])
        self._home_hours = np.array([r.uniform(6, 12) for r in rngs])
        self._drain = np.array([r.uniform(0.02, 0.07) for r in rngs]) * STEP_S / 3_600
        self._charge = np.array([r.uniform(0.15, 0.4) for r in rngs]) * STEP_S / 3_600
        self._warmth = np.array([r.uniform(18, 30) for r in rngs])
        self._storage = [int(r.integers(2**28, 2**34)) for r in rngs]
        self._level = np.array([r.uniform(0.3, 1.0) for r in rngs])
        self._seed, self._step = seed, 0

    def states(self, time: float) -> Mapping[str, DeviceState]:
        self._advance(time)
        home, hour = self._home(self._step), self._hour(self._step)
        offline = seeding.generator(self._seed, "offline", self._step).random(len(self._names)) < 0.03
        found = {}
        for i, name in enumerate(self._names):
            network = "none" if offline[i] else ("wifi" if home[i] else "cellular")
            heat = self._warmth[i] + 5 * math.sin((hour - 9) / 24 * 2 * math.pi) + (8 if home[i] else 0)
            found[name] = DeviceState(
                battery_level=round(float(self._level[i]), 4),
                charging=bool(home[i]),
                network=network,
                metered=network == "cellular",
                temperature_c=round(float(heat), 1),
                free_storage_bytes=self._storage[i],
                num_examples=self._examples[name],
                data_age_s=0.0 if not home[i] else float(self._since_home(i, hour)),
                seen_at=time,
            )
        return found

    def trained(self, names: Sequence[str], time: float, cost: float = TRAINING_COST) -> None:
        self._advance(time)
        asked = np.isin(self._names, list(names))
        self._level = np.maximum(0.0, self._level - cost * asked)

    def _advance(self, time: float) -> None:
        for step in range(self._step, int(time // STEP_S)):
            change = np.where(self._home(step), self._charge, -self._drain)
            self._level = np.clip(self._level + change, 0.0, 1.0)
            self._step = step + 1

    def _home(self, step: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        since: np.ndarray[Any, np.dtype[np.float64]] = (self._hour(step) - self._home_from) % 24
        return since < self._home_hours

    @staticmethod
    def _hour(step: int) -> float:
        return step * STEP_S % DAY_S / 3_600

    def _since_home(self, device: int, hour: float) -> float:
        """Seconds since it came home: it collects data on its way only."""
        return float((hour - self._home_from[device]) % 24 * 3_600)


def open_states(name: str, examples: Mapping[str, int], seed: int) -> StateSource:
    """``--device-states``: "" = only the data are known, "generated", or a trace's file. Raises DataError."""
    if not name:
        return KnownData(examples)
    return GeneratedStates(examples, seed) if name == GENERATED else TraceStates(Path(name), examples)
