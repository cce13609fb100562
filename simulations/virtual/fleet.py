"""Classes of simulated devices, and which device is of which class: ``--devices FILE|generated``.

A file is TOML: one ``[[class]]`` table for each class (its keys are the fields of ``DeviceClass``), and an optional table
``[devices]`` from device name to class name. Devices that it does not name are dealt out by the classes' shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fl_core.contracts.config import number, parse, read_toml, text
from fl_core.contracts.errors import ConfigError
from fl_core.learning import seeding

GENERATED = "generated"


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """What devices of one class can do. Speeds are those of a typical device; each has its own, by ``spread``."""

    name: str = text("device")
    share: float = number(1.0, low=0.0, help="of the devices that the file does not name")
    examples_per_second: float = number(100.0, low=1e-6, help="training, forward and backward")
    down_mbit_s: float = number(20.0, low=1e-6)
    up_mbit_s: float = number(5.0, low=1e-6)
    latency_s: float = number(0.1, low=0.0, help="of each message, there and back")
    spread: float = number(0.0, low=0.0, high=3.0, help="standard deviation of the logarithm of a device's speeds")
    memory_mb: float = number(0.0, low=0.0, help="for training; 0 = enough")
    battery_per_hour: float = number(0.0, low=0.0, help="share of the charge that an hour of training costs")
    dropout: float = number(0.0, low=0.0, high=1.0, help="chance that a device asked never answers")
    slow_share: float = number(0.0, low=0.0, high=1.0, help="chance that a device is slow in a round")
    slowest: float = number(0.1, low=1e-3, high=1.0, help="a slow device has a share of its speed from here to 1")


GENERATED_CLASSES = (
    DeviceClass(name="gateway", share=0.2, examples_per_second=400.0, down_mbit_s=100.0, up_mbit_s=40.0, spread=0.2),
    DeviceClass(
        name="vehicle", share=0.5, examples_per_second=120.0, down_mbit_s=30.0, up_mbit_s=8.0, latency_s=0.2, spread=0.4,
        dropout=0.02, slow_share=0.1,
    ),
    DeviceClass(
        name="camera", share=0.3, examples_per_second=25.0, down_mbit_s=4.0, up_mbit_s=1.0, latency_s=0.5, spread=0.6,
        battery_per_hour=0.2, dropout=0.05, slow_share=0.3,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device: its class, with this device's own speeds."""

    kind: DeviceClass
    examples_per_second: float
    down_bytes_s: float
    up_bytes_s: float


class Fleet(Protocol):
    """What the virtual clock asks of the devices; everything is the same for the same seed, device and round."""

    def device(self, name: str) -> Device: ...

    def pace(self, name: str, round: int) -> float:
        """The share of its speed that the device has in this round, above 0, 1 = all of it."""

    def drops_out(self, name: str, exchange: str) -> bool:
        """Whether it never answers in this exchange."""


class ClassFleet:
    """Devices of classes; nothing is kept for each device."""

    def __init__(self, classes: Sequence[DeviceClass], named: Mapping[str, str], seed: int) -> None:
        self._classes = {c.name: c for c in classes}
        self._named, self._seed = dict(named), seed
        total, edge = sum(c.share for c in classes), 0.0
        self._edges: list[tuple[float, DeviceClass]] = []
        for found in classes:
            edge += found.share / total if total else 1.0
            self._edges.append((edge, found))

    def device(self, name: str) -> Device:
        rng = seeding.generator(self._seed, "device", name)
        draw, speed, link = rng.random(), rng.normal(), rng.normal()
        kind = next((c for edge, c in self._edges if draw < edge), self._edges[-1][1])
        if name in self._named:
            kind = self._classes[self._named[name]]
        fast, wide = math.exp(kind.spread * speed), math.exp(kind.spread * link)
        return Device(
            kind=kind,
            examples_per_second=kind.examples_per_second * fast,
            down_bytes_s=kind.down_mbit_s * wide * 125_000,
            up_bytes_s=kind.up_mbit_s * wide * 125_000,
        )

    def pace(self, name: str, round: int) -> float:
        kind = self.device(name).kind
        if not kind.slow_share:
            return 1.0
        rng = seeding.generator(self._seed, "pace", name, round)
        slow, share = rng.random() < kind.slow_share, rng.uniform(kind.slowest, 1.0)
        return float(share) if slow else 1.0

    def drops_out(self, name: str, exchange: str) -> bool:
        chance = self.device(name).kind.dropout
        return bool(chance) and float(seeding.generator(self._seed, "dropout", name, exchange).random()) < chance


def open_fleet(name: str, seed: int) -> ClassFleet:
    """``--devices``: "generated", or a TOML file. Raises ConfigError naming the file and the key."""
    if name == GENERATED:
        return ClassFleet(GENERATED_CLASSES, {}, seed)
    return read_fleet(Path(name), seed)


def read_fleet(file: Path, seed: int) -> ClassFleet:
    table = read_toml(file)
    if unknown := sorted(set(table) - {"class", "devices"}):
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}", remedy="accepted: [[class]], [devices]")
    tables, named = table.get("class", []), table.get("devices", {})
    if not isinstance(tables, list) or not tables or not isinstance(named, dict):
        raise ConfigError(f"{file}: at least one [[class]] is needed, and [devices] is a table of names")
    classes = []
    for number_, one in enumerate(tables, start=1):
        if not isinstance(one, dict):
            raise ConfigError(f"{file}: class {number_} is not a table")
        classes.append(parse(DeviceClass, one, origin=str(file), prefix=f"class[{number_}]."))
    names = [c.name for c in classes]
    if len(set(names)) != len(names):
        raise ConfigError(f"{file}: two classes have the same name")
    if not any(c.share for c in classes):
        raise ConfigError(f"{file}: every class has share 0, so that a device that is not named has none")
    for device, kind in named.items():
        if kind not in names:
            raise ConfigError(
                f"{file}: devices.{device} = {kind!r}: no such class", remedy=f"known: {', '.join(names)}"
            )
    return ClassFleet(classes, named, seed)
