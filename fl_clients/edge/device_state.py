"""What this device can find out about its own condition: Linux's files, its own settings, and a file that the vehicle's
software keeps. Whatever is absent is unknown; nothing here fails.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fl_core.contracts import config
from fl_core.contracts.device_state import SIZE_LIMIT, DeviceState, from_table
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.names import NAME_PATTERN

LOG = logging.getLogger(__name__)
SENSOR_LIMIT = 4 << 10  # of one file below /sys
ROUTE_LIMIT = 64 << 10
ARPHRD_ETHER, ARPHRD_PPP, ARPHRD_RAWIP = 1, 512, 519
ROUTE_UP = 1
OWN = ("seen_at", "waiting", "trains", "version", "applications")  # not for the vehicle's software to say


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """``[state]`` of agent.toml: what no probe can find out."""

    group: str = config.text("", help="of this device, until the server's operator gives it another")
    tags: tuple[str, ...] = config.sequence((), help="what the server may ask for, such as front-camera")
    power: str = config.choice("auto", "auto", "mains", help="mains: no battery, always supplied")
    metered: str = config.choice("auto", "auto", "yes", "no", help="auto: a cellular network is, another is not")
    file: str = config.text("", help="JSON that the vehicle's own software keeps current; relative to agent.toml")
    file_max_age_s: float = config.number(120.0, low=1.0, high=86_400.0, help="an older file says nothing")

    def __post_init__(self) -> None:
        for name in (self.group, *self.tags):
            if name and not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"{name!r} is not usable as a group or tag")


class Probes:
    """root: where /sys and /proc are. data: the folder whose file system counts as free storage."""

    def __init__(self, settings: StateSettings, home: Path, data: Path, *, root: Path = Path("/")) -> None:
        self._settings, self._home, self._data, self._root = settings, home, data, root
        self._file_error = ""

    def read(self) -> DeviceState:
        """The condition now: probes, over them the vehicle's file."""
        level, charging = self._battery() if self._settings.power == "auto" else (None, True)
        network = self._network()
        state = DeviceState(
            battery_level=level,
            charging=charging,
            network=network,
            temperature_c=self._temperature(),
            free_storage_bytes=self._free_storage(),
            free_memory_bytes=self._free_memory(),
            group=self._settings.group or None,
            tags=self._settings.tags,
        )
        state = self._with_file(state)
        if self._settings.metered != "auto":
            return replace(state, metered=self._settings.metered == "yes")
        if state.metered is None and state.network in ("ethernet", "wifi", "cellular"):
            return replace(state, metered=state.network == "cellular")
        return state

    # power

    def _battery(self) -> tuple[float | None, bool | None]:
        """(mean charge of the batteries; whether power comes from outside)."""
        levels, statuses, mains = list[float](), list[str](), list[bool]()
        for supply in self._folders("sys/class/power_supply"):
            kind = _text(supply / "type")
            if kind == "Battery" and _text(supply / "scope") != "Device":  # a mouse's battery is not ours
                if (capacity := _integer(supply / "capacity")) is not None and 0 <= capacity <= 100:
                    levels.append(capacity / 100)
                statuses.append(_text(supply / "status"))
            elif kind in ("Mains", "USB") and (online := _integer(supply / "online")) is not None:
                mains.append(online > 0)
        level = sum(levels) / len(levels) if levels else None
        if statuses and any(status in ("Charging", "Full", "Not charging") for status in statuses):
            return level, True
        if "Discharging" in statuses:
            return level, False
        return level, any(mains) if mains else None

    def _temperature(self) -> float | None:
        """The hottest zone, in Celsius."""
        found = []
        for zone in self._folders("sys/class/thermal"):
            value = _integer(zone / "temp") if zone.name.startswith("thermal_zone") else None
            if value is not None and -50_000 <= value <= 200_000 and value != 0:
                found.append(value / 1000)
        return max(found, default=None)

    # network

    def _network(self) -> str | None:
        """The kind of interface of the default route; "none" without one; None where there is no such table."""
        table = _read(self._root / "proc/net/route", ROUTE_LIMIT)
        if table is None:
            return None
        best: tuple[int, str] | None = None
        for line in table.splitlines()[1:]:
            parts = line.split()
            try:
                name, destination, flags, metric, mask = parts[0], parts[1], int(parts[3], 16), int(parts[6]), parts[7]
            except (IndexError, ValueError):
                continue
            if destination == mask == "00000000" and flags & ROUTE_UP and (best is None or metric < best[0]):
                best = (metric, name)
        if best is None:
            return "ethernet" if self._sixth_version() else "none"
        return self._kind(best[1])

    def _sixth_version(self) -> bool:
        """A default route of IPv6 alone."""
        table = _read(self._root / "proc/net/ipv6_route", ROUTE_LIMIT) or ""
        rows = [line.split() for line in table.splitlines()]
        return any(len(row) == 10 and row[0] == "0" * 32 and row[1] == "00" and row[9] != "lo" for row in rows)

    def _kind(self, interface: str) -> str:
        if "/" in interface or interface in (".", ".."):
            return "unknown"
        folder = self._root / "sys/class/net" / interface
        told = _text(folder / "uevent")
        if (folder / "wireless").exists() or (folder / "phy80211").exists() or "DEVTYPE=wlan" in told:
            return "wifi"
        if "DEVTYPE=wwan" in told or interface.startswith(("wwan", "ppp", "rmnet")):
            return "cellular"
        hardware = _integer(folder / "type")
        if hardware in (ARPHRD_PPP, ARPHRD_RAWIP):
            return "cellular"
        return "ethernet" if hardware == ARPHRD_ETHER else "unknown"

    # room

    def _free_storage(self) -> int | None:
        for folder in (self._data, self._home):
            try:
                found = os.statvfs(folder)
            except OSError:
                continue
            return found.f_bavail * found.f_frsize
        return None

    def _free_memory(self) -> int | None:
        for line in (_read(self._root / "proc/meminfo", ROUTE_LIMIT) or "").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable" and rest.split()[:1] and rest.split()[0].isdigit():
                return int(rest.split()[0]) * 1024
        return None

    # the vehicle's own software

    def _with_file(self, state: DeviceState) -> DeviceState:
        if not self._settings.file:
            return state
        path = self._home / Path(self._settings.file).expanduser()
        try:
            told = read_file(path, self._settings.file_max_age_s)
            self._file_error = ""
        except IntegrityError as error:
            if error.message != self._file_error:  # once, not at every reading
                LOG.warning("agent: [state] file: %s", error.message)
                self._file_error = error.message
            return state
        nothing = DeviceState()
        values = {f.name: getattr(told, f.name) for f in fields(told) if f.name not in OWN}
        return replace(state, **{name: v for name, v in values.items() if v != getattr(nothing, name)})

    def _folders(self, below: str) -> Iterable[Path]:
        try:
            return sorted((self._root / below).iterdir())
        except OSError:
            return ()


def read_file(path: Path, max_age_s: float) -> DeviceState:
    """Raises IntegrityError: absent, too old, too large, or not a state."""
    try:
        with path.open("rb") as stream:
            age = time.time() - os.fstat(stream.fileno()).st_mtime
            data = stream.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise IntegrityError(f"{path}: not readable: {error.strerror}") from None
    if age > max_age_s:
        raise IntegrityError(f"{path}: not written for more than {max_age_s:.0f} s")
    if len(data) > SIZE_LIMIT:
        raise IntegrityError(f"{path}: over the limit of {SIZE_LIMIT:,} bytes")
    try:
        table: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path}: not JSON") from None
    return from_table(table, origin=str(path))


def _read(path: Path, limit: int) -> str | None:
    try:
        with path.open("rb") as stream:
            return stream.read(limit).decode("utf-8", "replace")
    except OSError:
        return None


def _text(path: Path) -> str:
    return (_read(path, SENSOR_LIMIT) or "").strip()


def _integer(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None
