"""What a device says of its own condition. None everywhere means that it is not known; None is never sent."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.names import NAME_PATTERN

NETWORKS = ("ethernet", "wifi", "cellular", "none", "unknown")
SIZE_LIMIT = 16 << 10  # of a state as JSON, with what we do not know of it
TEXT_LIMIT, NAMES_LIMIT = 300, 64
LARGEST = 2**53  # what JSON readers agree on
YEARS_S = 100 * 365 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class DataState:
    """One application's data on a device. age_s: of the newest sample."""

    num_examples: int | None = None
    age_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """battery_level: 0 to 1. metered: the way to the server costs by volume. waiting: why the device would not train
    now, by its own policy; "" = it would. num_examples, data_age_s: of the whole device; ``data``: by application.
    applications: name -> version. version: of fieldfleet. trains: whether it takes part in federations at all.
    seen_at: when the server heard it last, seconds since 1970. clock_skew_s: the device's clock minus the server's.
    extra: what a newer device says, kept as it is.
    """

    battery_level: float | None = None
    charging: bool | None = None
    network: str | None = None
    metered: bool | None = None
    temperature_c: float | None = None
    free_storage_bytes: int | None = None
    free_memory_bytes: int | None = None
    num_examples: int | None = None
    data_age_s: float | None = None
    data: Mapping[str, DataState] = field(default_factory=dict)
    applications: Mapping[str, str] | None = None
    version: str | None = None
    trains: bool | None = None
    group: str | None = None
    tags: tuple[str, ...] | None = None
    waiting: str | None = None
    clock_skew_s: float | None = None
    seen_at: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def of(self, application: str) -> DataState:
        """Of this application's data; of the whole device where it does not tell them apart."""
        whole = DataState(num_examples=self.num_examples, age_s=self.data_age_s)
        return self.data.get(application, whole)

    def to_table(self) -> dict[str, Any]:
        """JSON-ready, known values only; the inverse of ``from_table``."""
        table: dict[str, Any] = dict(self.extra)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is None or f.name == "extra" or (f.name == "data" and not value):
                continue
            table[f.name] = _plain(value)
        return table


def from_table(table: Any, *, origin: str) -> DeviceState:
    """Raises IntegrityError naming the key. Unknown keys are kept in ``extra``."""
    if not isinstance(table, Mapping):
        raise IntegrityError(f"{origin}: the device's state is not a table")
    try:
        size = len(json.dumps(table, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        raise IntegrityError(f"{origin}: the device's state is not JSON") from None
    if size > SIZE_LIMIT:
        raise IntegrityError(f"{origin}: the device's state is over the limit of {SIZE_LIMIT:,} bytes")
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in table.items():
        if value is None:
            continue
        if key not in READERS:
            extra[key] = value
            continue
        found = READERS[key](value)
        if found is None:
            raise IntegrityError(f"{origin}: {key} = {f'{value!r}'[:80]} is not accepted")
        values[key] = found
    return DeviceState(**values, extra=extra)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {name: _plain(held) for name, held in value.items()}
    if isinstance(value, DataState):
        return {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    return value


# Readers: a value, or None where it is not acceptable.

Reader = Callable[[Any], Any]


def _number(low: float, high: float) -> Reader:
    def read(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if low <= value <= high and math.isfinite(value) else None

    return read


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= LARGEST else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _network(value: Any) -> str | None:
    return value if isinstance(value, str) and value in NETWORKS else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= TEXT_LIMIT and value.isprintable() else None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and NAME_PATTERN.fullmatch(value) else None


def _names(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) > NAMES_LIMIT:
        return None
    return tuple(value) if all(_name(v) is not None for v in value) else None


def _versions(value: Any) -> dict[str, str] | None:
    if not isinstance(value, Mapping) or len(value) > NAMES_LIMIT:
        return None
    good = all(_name(k) is not None and _text(v) is not None for k, v in value.items())
    return dict(value) if good else None


def _data(value: Any) -> dict[str, DataState] | None:
    if not isinstance(value, Mapping) or len(value) > NAMES_LIMIT:
        return None
    found: dict[str, DataState] = {}
    for name, held in value.items():
        if _name(name) is None or not isinstance(held, Mapping):
            return None
        count, age = held.get("num_examples"), held.get("age_s")
        state = DataState(num_examples=_count(count), age_s=_number(0.0, YEARS_S)(age))
        if (count is not None and state.num_examples is None) or (age is not None and state.age_s is None):
            return None
        found[name] = state
    return found


READERS: Mapping[str, Reader] = {
    "battery_level": _number(0.0, 1.0),
    "charging": _flag,
    "network": _network,
    "metered": _flag,
    "temperature_c": _number(-100.0, 300.0),
    "free_storage_bytes": _count,
    "free_memory_bytes": _count,
    "num_examples": _count,
    "data_age_s": _number(0.0, YEARS_S),
    "data": _data,
    "applications": _versions,
    "version": _text,
    "trains": _flag,
    "group": _name,
    "tags": _names,
    "waiting": _text,
    "clock_skew_s": _number(-YEARS_S, YEARS_S),
    "seen_at": _number(0.0, YEARS_S),
}
