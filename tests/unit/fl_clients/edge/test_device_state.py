"""Probes over real folder trees, as Linux has them; whatever is absent or broken is unknown."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from fl_clients.edge.device_state import Probes, StateSettings
from fl_core.contracts import config
from fl_core.contracts.device_state import DeviceState
from fl_core.contracts.errors import ConfigError

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def write(root: Path, path: str, content: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content)


def read(root: Path, settings: StateSettings | None = None) -> DeviceState:
    return Probes(settings or StateSettings(), root, root / "no-data", root=root).read()


def supply(root: Path, name: str, **files: str) -> None:
    for file, content in files.items():
        write(root, f"sys/class/power_supply/{name}/{file}", content + "\n")


def route(root: Path, *rows: tuple[str, int]) -> None:
    lines = "".join(f"{name}\t00000000\t010200C0\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n" for name, metric in rows)
    write(root, "proc/net/route", ROUTES + "eth9\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n" + lines)


def test_nothing_is_there(tmp_path: Path) -> None:
    state = read(tmp_path)
    assert state.free_storage_bytes is not None
    assert state == DeviceState(free_storage_bytes=state.free_storage_bytes, tags=())


def test_this_machine_can_be_read() -> None:
    state = Probes(StateSettings(), Path("/tmp"), Path("/tmp")).read()
    assert state.free_storage_bytes is not None
    assert state.free_memory_bytes is not None


@pytest.mark.parametrize(
    ("status", "charging"), [("Charging", True), ("Full", True), ("Discharging", False), ("Unknown", None)]
)
def test_a_battery(tmp_path: Path, status: str, charging: bool | None) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="73", status=status)
    supply(tmp_path, "mouse", type="Battery", capacity="5", status="Discharging", scope="Device")
    state = read(tmp_path)
    assert (state.battery_level, state.charging) == (0.73, charging)


def test_two_batteries_and_mains(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="50", status="Unknown")
    supply(tmp_path, "BAT1", type="Battery", capacity="100", status="Unknown")
    supply(tmp_path, "AC", type="Mains", online="1")
    state = read(tmp_path)
    assert (state.battery_level, state.charging) == (0.75, True)


def test_broken_sensors_are_unknown(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="many", status="")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "hot")
    write(tmp_path, "proc/meminfo", "MemAvailable:\n")
    write(tmp_path, "proc/net/route", "what\never\n\t\t\n")
    state = read(tmp_path)
    assert (state.battery_level, state.charging, state.temperature_c, state.free_memory_bytes) == (None,) * 4
    assert state.network == "none"


def test_the_hottest_zone_and_free_memory(tmp_path: Path) -> None:
    for number, value in enumerate(("41000", "63500", "0", "-273000")):
        write(tmp_path, f"sys/class/thermal/thermal_zone{number}/temp", value)
    write(tmp_path, "sys/class/thermal/cooling_device0/temp", "99000")
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   2048 kB\n")
    state = read(tmp_path)
    assert (state.temperature_c, state.free_memory_bytes) == (63.5, 2 << 20)


@pytest.mark.parametrize(
    ("files", "network", "metered"),
    [
        ({"type": "1", "uevent": "INTERFACE=if0"}, "ethernet", False),
        ({"type": "1", "uevent": "DEVTYPE=wlan"}, "wifi", False),
        ({"type": "1", "wireless/x": ""}, "wifi", False),
        ({"type": "1", "uevent": "DEVTYPE=wwan"}, "cellular", True),
        ({"type": "512"}, "cellular", True),
        ({"type": "519"}, "cellular", True),
        ({"type": "65534"}, "unknown", None),
        ({}, "unknown", None),
    ],
)
def test_the_network_is_that_of_the_default_route(
    tmp_path: Path, files: dict[str, str], network: str, metered: bool | None
) -> None:
    route(tmp_path, ("other0", 600), ("if0", 100))
    write(tmp_path, "sys/class/net/other0/type", "1")
    for name, content in files.items():
        write(tmp_path, f"sys/class/net/if0/{name}", content)
    state = read(tmp_path)
    assert (state.network, state.metered) == (network, metered)
    assert read(tmp_path, StateSettings(metered="yes")).metered is True
    assert read(tmp_path, StateSettings(metered="no")).metered is False


def test_the_vehicles_file_comes_before_the_probes(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="73", status="Charging")
    told = {"battery_level": 0.0, "charging": False, "num_examples": 12, "ignition": True, "waiting": "x", "seen_at": 3}
    write(tmp_path, "vehicle.json", json.dumps(told))
    settings = StateSettings(file="vehicle.json", file_max_age_s=60.0, group="vans", tags=("gpu",))
    state = read(tmp_path, settings)
    assert (state.battery_level, state.charging, state.num_examples) == (0.0, False, 12)
    assert (state.group, state.tags, state.extra) == ("vans", ("gpu",), {"ignition": True})
    assert (state.waiting, state.seen_at) == (None, None)


@pytest.mark.parametrize("content", ["{", "[]", '{"battery_level": 5}', '{"x": "' + "y" * 20_000 + '"}', None])
def test_a_file_that_is_wrong_absent_or_old_says_nothing(tmp_path: Path, content: str | None) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="73", status="Charging")
    settings = StateSettings(file="vehicle.json", file_max_age_s=60.0)
    if content is not None:
        write(tmp_path, "vehicle.json", content)
    assert read(tmp_path, settings).battery_level == 0.73
    write(tmp_path, "vehicle.json", '{"battery_level": 0.1}')
    assert read(tmp_path, settings).battery_level == 0.1
    before = time.time() - 3_600
    os.utime(tmp_path / "vehicle.json", (before, before))
    assert read(tmp_path, settings).battery_level == 0.73


def test_mains_power_can_be_declared(tmp_path: Path) -> None:
    assert read(tmp_path, StateSettings(power="mains")).charging is True


def test_unusable_tags_are_refused() -> None:
    with pytest.raises(ConfigError, match="not usable"):
        config.parse(StateSettings, {"tags": ["a b"]}, origin="agent.toml", prefix="state.")
