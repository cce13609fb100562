"""States of devices on the server: over MQTT and by POST, into one table, into the selection."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fl_clients.connection import ServerConnection
from fl_core.contracts.device_state import DeviceState
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from fl_core.link.envelope import Envelope
from fl_server.device_states import DeviceStates, fleet_selector, parse_posted
from fl_server.device_table import DeviceTable
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from fl_server.registry import Registry
from fl_server.selection import Choice, StateSelector
from fl_server.superlink import SuperLink
from tests.federation import connect, devices, new_home, new_key, running
from tests.helpers import eventually


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
    (found,) = DeviceStates(superlink.devices, superlink.registry)().items()
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
    table, registry = DeviceTable(tmp_path / "devices.db"), Registry(tmp_path / "registry.db")
    for number in (1, 2, 3):
        registry.register(f"van-{number}", keys.public_pem(new_key(tmp_path / str(number))))
    body = {"device": {"charging": True}, "capabilities": {"runtime": {"fieldfleet": "2.0"}}}
    table.note_state("van-1", Envelope(type="birth", boot=1, connection=1, body=body))
    table.note_state("van-2", Envelope(type="birth", boot=1, connection=1, body={"device": {"charging": "maybe"}}))
    table.note_state("stranger", Envelope(type="birth", boot=1, connection=1, body={}))
    found = DeviceStates(table, registry)()
    assert (found["van-1"].charging, found["van-1"].version) == (True, "2.0")
    assert found["van-2"] == DeviceState(seen_at=found["van-2"].seen_at)
    assert found["van-3"] == DeviceState()
    assert "stranger" not in found
    table.note_posted("van-1", {"device": {"charging": False}})
    row = next(row for row in table.devices() if row["name"] == "van-1")
    assert (row["alive"], row["boot"], row["state"]) == (True, 1, {"device": {"charging": False}})
    table.close()
    registry.close()


def test_the_operators_group_and_tags_come_first(tmp_path: Path) -> None:
    table, registry = DeviceTable(tmp_path / "devices.db"), Registry(tmp_path / "registry.db")
    for name, group, tags in (("van-1", "vans", ["gpu"]), ("van-2", "", [])):
        registry.register(name, keys.public_pem(new_key(tmp_path / name)), group=group, tags=tags)
        table.note_posted(name, {"device": {"group": "own", "tags": ["camera"]}})
    found = DeviceStates(table, registry)()
    assert (found["van-1"].group, found["van-1"].tags) == ("vans", ("gpu", "camera"))
    assert (found["van-2"].group, found["van-2"].tags) == ("own", ("camera",))
    table.close()
    registry.close()


class Recorded:
    """A selector whose choices the test can see."""

    def __init__(self, inner: StateSelector) -> None:
        self.inner, self.choices = inner, list[Choice]()

    def choose(self, names: Sequence[str], count: int, *, round: int) -> Choice:
        self.choices.append(self.inner.choose(names, count, round=round))
        return self.choices[-1]

    def note(self, record: RoundRecord) -> None:
        self.inner.note(record)


def test_a_round_waits_for_a_device_whose_state_changes(superlink: SuperLink, tmp_path: Path) -> None:
    app = application("toy_regression")
    config = app.configure(
        [
            "selection.min_battery=0.5",
            "algorithm.min_clients=2",
            "algorithm.evaluate_every=0",
            "algorithm.deadline_s=90",
        ]
    )
    with devices(superlink, tmp_path, "van-1", "van-2") as processes:
        grid = superlink.grid()
        grid.wait_devices(2, 60)
        for name, level in (("van-1", 0.1), ("van-2", 0.9)):
            superlink.devices.note_posted(name, {"device": {"battery_level": level}})
        selector = Recorded(fleet_selector(config, app.name, superlink, 0))
        engine = RoundEngine(
            grid=grid,
            application=app,
            config=config,
            start=None,
            initial=get_arrays(app.build_model(config)),
            num_rounds=2,
            seed=0,
            out=tmp_path / "out",
            stage="federated",
            selector=selector,
        )
        thread = threading.Thread(target=engine.run)
        thread.start()
        try:
            eventually(lambda: selector.choices, 60)
            assert "battery 0.10" in selector.choices[0].skipped["van-1"]
            assert not processes[1].seen(), "one is too few"
            charged = ServerConnection(superlink.url, superlink.home.ca_file, processes[0].key)
            assert post(charged, b'{"device": {"battery_level": 0.1, "charging": true}}') == 204
            charged.close()
        finally:
            thread.join(200)
        assert not thread.is_alive()
    assert [sorted(record.clients) for record in engine.history.records] == [["van-1", "van-2"]] * 2


def test_a_posted_body_names_what_is_wrong() -> None:
    with pytest.raises(IntegrityError, match=r"van-1: capabilities: applications"):
        parse_posted(b'{"capabilities": {"applications": {"toy": 3}}}', origin="van-1")
