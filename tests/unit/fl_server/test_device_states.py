"""States of devices on the server: over MQTT and by POST, into one table, into the selection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_clients.connection import ServerConnection
from fl_core.contracts.device_state import DeviceState
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire
from fl_core.identity import keys
from fl_core.link.envelope import Envelope
from fl_server.device_states import DeviceStates, parse_posted
from fl_server.device_table import DeviceTable
from fl_server.superlink import SuperLink
from tests.federation import connect, new_home, new_key, running


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[SuperLink]:
    with running(new_home(tmp_path / "home")) as found:
        yield found


@pytest.fixture
def connection(superlink: SuperLink, tmp_path: Path) -> ServerConnection:
    key = new_key(tmp_path / "van-1")
    superlink.registry.register("van-1", keys.public_pem(key))
    return connect(superlink, key)


def post(connection: ServerConnection, body: bytes) -> int:
    return connection.request("POST", wire.STATE_PATH, body, limit=10_000).status


def test_a_posted_state_is_what_the_selection_sees(superlink: SuperLink, connection: ServerConnection) -> None:
    body = {
        "device": {"battery_level": 0.5, "network": "wifi", "seen_at": 1.0},
        "capabilities": {"applications": {"toy_regression": "1.0"}, "roles": {"train": True}},
        "nonsense": "x" * 1_000,
    }
    assert post(connection, json.dumps(body).encode()) == 204
    (found,) = DeviceStates(superlink.devices)().items()
    name, state = found
    assert name == "van-1"
    assert (state.battery_level, state.network, state.trains) == (0.5, "wifi", True)
    assert state.applications == {"toy_regression": "1.0"}
    assert state.seen_at is not None
    assert state.seen_at > 1e9, "the server's own clock"
    assert "nonsense" not in superlink.devices.devices()[0]["state"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"device": {"battery_level": 7}}', 400),
        (b'{"device": {"more": "' + b"x" * 20_000 + b'"}}', 400),
        (b" " * 70_000, 413),
    ],
)
def test_what_is_wrong_is_refused(superlink: SuperLink, connection: ServerConnection, body: bytes, status: int) -> None:
    assert post(connection, body) == status
    assert superlink.devices.devices() == []


def test_strangers_and_revoked_devices_are_refused(
    superlink: SuperLink, connection: ServerConnection, tmp_path: Path
) -> None:
    assert post(connect(superlink, new_key(tmp_path / "stranger")), b"{}") == 401
    superlink.registry.revoke("van-1")
    assert post(connection, b"{}") == 401
    assert superlink.devices.devices() == []


def test_over_mqtt_the_same_table_is_filled(tmp_path: Path) -> None:
    table = DeviceTable(tmp_path / "devices.db")
    body = {"device": {"charging": True}, "capabilities": {"runtime": {"fieldfleet": "2.0"}}}
    table.note_state("van-1", Envelope(type="birth", boot=1, connection=1, body=body))
    table.note_state("van-2", Envelope(type="birth", boot=1, connection=1, body={"device": {"charging": "maybe"}}))
    table.note_state("van-3", Envelope(type="birth", boot=1, connection=1, body={}))
    found = DeviceStates(table)()
    assert (found["van-1"].charging, found["van-1"].version) == (True, "2.0")
    for name in ("van-2", "van-3"):
        assert found[name] == DeviceState(seen_at=found[name].seen_at)
    table.note_posted("van-1", {"device": {"charging": False}})
    row = table.devices()[0]
    assert (row["alive"], row["boot"], row["state"]) == (True, 1, {"device": {"charging": False}})
    table.close()


def test_a_posted_body_names_what_is_wrong() -> None:
    with pytest.raises(IntegrityError, match=r"van-1: capabilities: applications"):
        parse_posted(b'{"capabilities": {"applications": {"toy": 3}}}', origin="van-1")
