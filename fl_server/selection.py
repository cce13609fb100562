"""Who takes part in a round: one policy for the fleet and for the simulator."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fl_core.contracts.device_state import DeviceState
from fl_core.contracts.sections import SelectionConfig
from fl_core.learning import seeding
from fl_server.history import RoundRecord

States = Callable[[], Mapping[str, DeviceState]]
UNKNOWN_STATE = DeviceState()


@dataclass(frozen=True)
class Choice:
    """Who is asked in a round, sorted by name; ``skipped``: who was passed over for a reason, and the reason."""

    chosen: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


class Selector(Protocol):
    """Policy without I/O apart from what it is told of the devices."""

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        """At most ``count`` of ``names`` (0 = all that may), the same ones for the same round and device states."""

    def note(self, record: RoundRecord) -> None:
        """A round is over; an engine that takes a run up tells of its earlier rounds first."""


class UniformSelector:
    """Everyone who is there may be chosen."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        return Choice(select(names, count, seed=self._seed, round=round))

    def note(self, record: RoundRecord) -> None:
        """Chance has no memory."""


class StateSelector:
    """By the devices' states, the [selection] of the preset and who took part before; seeded.

    states(): what is known of each device now. application: whose version and data count. clock: seconds since 1970,
    for the age of states.
    """

    def __init__(
        self,
        settings: SelectionConfig,
        states: States,
        *,
        seed: int,
        application: str,
        clock: Callable[[], float],
    ) -> None:
        self._settings, self._states, self._seed = settings, states, seed
        self._application, self._clock = application, clock
        self._last: dict[str, int] = {}

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        states, now = self._states(), self._clock()
        skipped: dict[str, str] = {}
        able: dict[str, DeviceState] = {}
        for name in sorted(names):
            state = states.get(name, UNKNOWN_STATE)
            reason = why_not(state, self._settings, self._application, now)
            if reason:
                skipped[name] = reason
            else:
                able[name] = state
        return Choice(self._among(able, count, round), skipped)

    def note(self, record: RoundRecord) -> None:
        """Whoever was asked has had its turn, whatever came of it: else a failing device takes every turn."""
        for name in (*record.clients, *record.refused, *record.late):
            self._last[name] = max(record.round, self._last.get(name, 0))

    def _among(self, able: Mapping[str, DeviceState], count: int, round: int) -> tuple[str, ...]:
        if self._settings.fairness == "least_recent":
            return least_recent(able, count, self._last, seed=self._seed, round=round)
        if self._settings.weight == "examples":
            sizes = {name: state.of(self._application).num_examples for name, state in able.items()}
            return by_size(sizes, count, seed=self._seed, round=round)
        return select(tuple(able), count, seed=self._seed, round=round)


def why_not(state: DeviceState, wanted: SelectionConfig, application: str, now: float) -> str:
    """Why this device is not asked; "" when it may be. Pure: the same words on the server and in a simulation."""
    if state.trains is False:
        return "does not train"
    if state.applications is not None and application not in state.applications:
        return f"has no {application}"
    age = None if state.seen_at is None else now - state.seen_at
    if wanted.max_state_age_s and age is not None and age > wanted.max_state_age_s:
        if wanted.unknown == "refuse":
            return f"state is {age:.0f} s old, at most {wanted.max_state_age_s:.0f} s are accepted"
        state = DeviceState(applications=state.applications, group=state.group, tags=state.tags)
    if state.waiting:
        return f"waits by its own policy: {state.waiting}"
    for applies, known, refusal in _conditions(state, wanted, application):
        if not applies:
            continue
        if known is None:
            if wanted.unknown == "refuse":
                return f"{applies} is unknown"
        elif not known:
            return refusal
    return ""


def _conditions(
    state: DeviceState, wanted: SelectionConfig, application: str
) -> Iterable[tuple[str, bool | None, str]]:
    """(what it is about, or "" where nothing is asked; whether it is met, None = unknown; words when it is not)."""
    data = state.of(application)
    yield (
        "battery" if wanted.min_battery else "",
        _battery(state, wanted.min_battery),
        f"battery {_shown(state.battery_level, 2)}, at least {wanted.min_battery:.2f} wanted",
    )
    yield "charging" if wanted.require_charging else "", state.charging, "not charging"
    metered = None if state.metered is None else not state.metered
    yield "metered" if not wanted.allow_metered else "", metered, "on a metered network"
    network = None if state.network in (None, "unknown") else state.network in wanted.networks
    if "unknown" in wanted.networks:
        network = state.network in (None, *wanted.networks)
    yield "network" if wanted.networks else "", network, f"on network {state.network}"
    yield (
        "temperature" if wanted.max_temperature_c else "",
        _at_most(state.temperature_c, wanted.max_temperature_c),
        f"{_shown(state.temperature_c)} C, at most {wanted.max_temperature_c:.0f} C wanted",
    )
    yield (
        "free storage" if wanted.min_free_storage else "",
        _at_least(state.free_storage_bytes, wanted.min_free_storage),
        f"{_shown(state.free_storage_bytes)} bytes of storage free, at least {wanted.min_free_storage} wanted",
    )
    yield (
        "number of examples" if wanted.min_examples else "",
        _at_least(data.num_examples, wanted.min_examples),
        f"{data.num_examples} examples, at least {wanted.min_examples} wanted",
    )
    yield (
        "age of the data" if wanted.max_data_age_s else "",
        _at_most(data.age_s, wanted.max_data_age_s),
        f"newest sample {_shown(data.age_s)} s old, at most {wanted.max_data_age_s:.0f} s wanted",
    )
    version = (state.applications or {}).get(application)
    yield (
        "version" if wanted.min_version else "",
        None if version is None else version_key(version) >= version_key(wanted.min_version),
        f"version {version}, at least {wanted.min_version} wanted",
    )
    group = None if state.group is None else state.group in wanted.groups
    yield "group" if wanted.groups else "", group, f"in group {state.group}"
    lacking = [tag for tag in wanted.tags if tag not in (state.tags or ())]
    tags = None if state.tags is None else not lacking
    yield "tags" if wanted.tags else "", tags, f"without tag {', '.join(lacking)}"


def _battery(state: DeviceState, least: float) -> bool | None:
    if state.charging:
        return True
    return _at_least(state.battery_level, least)


def _at_least(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


def _at_most(value: float | None, most: float) -> bool | None:
    return None if value is None else value <= most


def _shown(value: float | None, digits: int = 0) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 1.10.0rc1 -> (1, 10); 1.2 equals 1.2.0."""
    numbers = []
    for part in version.split("."):
        if not re.fullmatch(r"[0-9]{1,9}", part):
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def select(names: Sequence[str], clients_per_round: int, *, seed: int, round: int) -> tuple[str, ...]:
    """Uniformly without replacement, by (seed, round) and the sorted names; 0 = everyone. Sorted."""
    ordered = names if getattr(names, "is_sorted", False) else sorted(names)
    if clients_per_round <= 0 or clients_per_round >= len(ordered):
        return tuple(ordered)
    chosen = seeding.generator(seed, "selection", round).choice(len(ordered), clients_per_round, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))


def least_recent(
    names: Iterable[str], count: int, last: Mapping[str, int], *, seed: int, round: int
) -> tuple[str, ...]:
    """Those whose last turn (a round; 0 = never) is longest ago; among equals by chance. 0 = everyone. Sorted."""
    ordered = sorted(names)
    if count <= 0 or count >= len(ordered):
        return tuple(ordered)
    draws = seeding.generator(seed, "selection", round).random(len(ordered))
    turns = sorted(zip((last.get(n, 0) for n in ordered), draws, ordered, strict=True))
    return tuple(sorted(name for _, _, name in turns[:count]))


def by_size(sizes: Mapping[str, int | None], count: int, *, seed: int, round: int) -> tuple[str, ...]:
    """Without replacement, with chances by number of examples (Efraimidis and Spirakis 2006); unknown = the median.

    A device without examples is chosen last. 0 = everyone. Sorted.
    """
    ordered = sorted(sizes)
    if count <= 0 or count >= len(ordered):
        return tuple(ordered)
    known = sorted(size for size in sizes.values() if size is not None)
    usual = known[len(known) // 2] if known else 1
    draws = seeding.generator(seed, "selection", round).random(len(ordered))
    keys = []
    for name, draw in zip(ordered, draws, strict=True):
        size = sizes[name]
        weight = usual if size is None else size
        keys.append((-math.log(1.0 - draw) / weight if weight > 0 else math.inf, name))
    return tuple(sorted(name for _, name in sorted(keys)[:count]))
