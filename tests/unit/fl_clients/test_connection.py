"""What a device accepts as a server address, an authority and a welcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.connection import ServerConnection, parse_welcome
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.names import DEFAULT_SERVER_PORT
from fl_core.identity import ca

KEY = ec.generate_private_key(ec.SECP384R1())
WELCOME: dict[str, Any] = {
    "name": "van-7",
    "fleet": "test",
    "node_id": 2**64 - 1,
    "mqtt": {"host": "localhost", "port": 8883, "tls": True, "username": "van-7", "password": "secret"},
    "repository": "/fieldfleet/v1/repository/",
    "tuf_root": None,
    "time": 1.5,
}


@pytest.mark.parametrize("url", ["http://localhost:1", "ftp://x", "https://", "https://h:1/path", "https://u:p@/"])
def test_malformed_addresses(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="https://HOST:PORT"):
        ServerConnection(url, tmp_path / "ca.pem", KEY)


def test_the_port_may_be_left_out(tmp_path: Path) -> None:
    ca.create_ca(tmp_path, "test")
    assert (
        ServerConnection("field.example", tmp_path / "ca.pem", KEY).url
        == f"https://field.example:{DEFAULT_SERVER_PORT}"
    )


def test_missing_and_damaged_authority(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ca\.pem"):
        ServerConnection("https://localhost", tmp_path / "ca.pem", KEY)
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(IntegrityError, match=r"ca\.pem"):
        ServerConnection("https://localhost", tmp_path / "ca.pem", KEY)


def test_a_welcome_is_read() -> None:
    found = parse_welcome(json.dumps({**WELCOME, "later": "field"}).encode(), origin="server")
    assert (found.name, found.node_id, found.mqtt) == ("van-7", 2**64 - 1, WELCOME["mqtt"])


@pytest.mark.parametrize("field", WELCOME)
def test_a_welcome_with_a_wrong_field_names_it(field: str) -> None:
    wrong = {**WELCOME, field: [1]}
    with pytest.raises(IntegrityError, match=field):
        parse_welcome(json.dumps(wrong).encode(), origin="server")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "#", "+"])
def test_a_name_that_could_be_a_path_or_topic_is_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="name"):
        parse_welcome(json.dumps({**WELCOME, "name": name}).encode(), origin="server")


@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_noise_is_no_welcome(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="server"):
        parse_welcome(data, origin="server")
