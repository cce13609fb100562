"""The broker's account: what is read from its file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_clients.edge.broker_account import as_welcome, parse_account, read_account, write_account
from fl_core.contracts.errors import EnvironmentFault, InputError

ACCOUNT: dict[str, Any] = {
    "host": "broker.example",
    "port": 8883,
    "tls": True,
    "username": "van-1",
    "password": "secret",
    "fleet": "fleet-1",
}


def test_what_is_written_is_read_and_says_who_the_device_is(tmp_path: Path) -> None:
    file = tmp_path / "broker.json"
    assert read_account(file) is None
    write_account(file, ACCOUNT)
    assert file.stat().st_mode & 0o077 == 0
    assert read_account(file) == ACCOUNT
    found = as_welcome(ACCOUNT)
    assert (found.name, found.fleet) == ("van-1", "fleet-1")
    assert found.mqtt is not None
    assert found.mqtt["password"] == "secret"
    file.chmod(0o644)
    with pytest.raises(EnvironmentFault, match="other users"):
        read_account(file)


@pytest.mark.parametrize(
    "changes",
    [{"host": ""}, {"port": 0}, {"port": "8883"}, {"tls": 1}, {"username": "a/b"}, {"password": ""}, {"fleet": "#"}],
)
def test_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        parse_account(json.dumps({"broker": {**ACCOUNT, **changes}}), origin="account.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"broker": []}', "\ud800", '{"broker": {"host": "x"}}'])
def test_what_is_no_account_is_refused_with_the_command_that_makes_one(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_account(text, origin="account.json")
    assert "server account" in str(caught.value)
