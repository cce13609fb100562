"""The real agent's condition reaches the server, over MQTT and without it, and its owner's policy holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.sections import SelectionConfig
from fl_server.device_states import DeviceStates
from fl_server.selection import StateSelector
from tests.bundles import TOY
from tests.faults.test_agent_worker import ask, reply, trained
from tests.field import NAME, Field
from tests.helpers import eventually


@contextmanager
def field(work: Path, **options: Any) -> Iterator[Field]:
    found = Field(work, **options)
    found.register()
    found.superlink.bell.on_push(lambda nodes: found.service.wake([NAME]))
    try:
        yield found
    finally:
        found.stop()


def settle(field: Field, **changes: str) -> None:
    """Change keys of agent.toml, in place."""
    file = field.agent / "agent.toml"
    lines = file.read_text().splitlines()
    for key, value in changes.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{key} = ")]
        lines[at] = f"{key} = {value}"
    file.write_text("\n".join(lines) + "\n")


def vehicle(field: Field, **state: Any) -> None:
    """What the vehicle's own software writes: a new file in the place of the old one."""
    new = field.agent / "vehicle.json.new"
    new.write_text(json.dumps(state))
    os.replace(new, field.agent / "vehicle.json")


def chosen(field: Field, **settings: Any) -> dict[str, str]:
    """What the server's selection says of the device; {} = it would be asked."""
    states = DeviceStates(field.superlink.devices, field.superlink.registry)
    found = StateSelector(SelectionConfig(**settings), states, seed=0, application=TOY, clock=lambda: 0.0)
    return dict(found.choose([NAME], 0, round=1).skipped)


def test_the_vehicles_battery_decides_who_is_asked_and_when_it_trains(tmp_path: Path) -> None:
    with field(tmp_path) as found:
        settle(found, file='"vehicle.json"', train_min_battery="0.5", wait_s="0.5", tags='["camera"]')
        vehicle(found, battery_level=0.9, network="cellular")
        with found.running("--no-infer"):
            grid = found.superlink.grid()
            grid.wait_devices(1, 60)
            told = eventually(lambda: found.device()["state"].get("device"), 60)
            assert (told["battery_level"], told["network"], told["metered"]) == (0.9, "cellular", True)
            assert (told["tags"], told["waiting"]) == (["camera"], "")
            assert "clock_skew_s" in eventually(lambda: found.device()["state"], 60)["device"]
            assert chosen(found, min_battery=0.8, tags=("camera",), min_free_storage=1) == {}
            assert "metered" in chosen(found, allow_metered=False)[NAME]
            assert trained(grid, 1)
            eventually(lambda: found.device()["state"]["device"]["data"][TOY].get("num_examples", 0) > 0, 60)
            assert found.device()["state"]["device"]["data"][TOY]["age_s"] < 3_600
            assert "examples" in chosen(found, min_examples=10_000)[NAME]
            vehicle(found, battery_level=0.2, network="cellular")
            eventually(lambda: "battery 0.20" in chosen(found).get(NAME, ""), 60)
            assert "battery 0.20, 0.50 needed" in reply(grid, ask(grid, 2)).error.reason
            vehicle(found, battery_level=0.7, network="wifi")
            eventually(lambda: chosen(found) == {}, 60)
            assert trained(grid, 3)


def test_without_mqtt_the_condition_is_posted(tmp_path: Path) -> None:
    with field(tmp_path, mqtt="off") as found:
        settle(found, transport='"https"', group='"vans"', file='"vehicle.json"')
        vehicle(found, battery_level=0.4)
        with found.running("--no-infer", alive=False):
            states = DeviceStates(found.superlink.devices, found.superlink.registry)
            state = eventually(lambda: s if (s := states()[NAME]).battery_level is not None else None, 60)
            assert (state.battery_level, state.group, state.trains) == (0.4, "vans", True)
            assert TOY in state.applications
            vehicle(found, battery_level=0.8)
            eventually(lambda: states()[NAME].battery_level == 0.8, 60)


@pytest.mark.slow
def test_a_worker_over_its_memory_limit_leaves_the_agent_alive_and_is_reported(tmp_path: Path) -> None:
    with field(tmp_path) as found:
        settle(found, worker_memory_mb="64")  # too little for torch
        with found.running("--no-infer") as process:
            grid = found.superlink.grid()
            grid.wait_devices(1, 60)
            assert "worker" in reply(grid, ask(grid, 1)).error.reason
            assert eventually(lambda: found.device()["state"]["training"]["crashes"] == 1, 60)
            assert eventually(lambda: found.bridge.table.reports(NAME, "worker-failed"), 60)
            assert process.poll() is None
            assert found.ask("ping")["ok"]
