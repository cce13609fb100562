"""Signed states, replies and commands: what was signed is taken, anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.identity import ca, keys
from fl_core.link import topics
from fl_core.link.envelope import Envelope, decode, encode
from fl_core.link.signed import CommandReader, CommandSigner, check_device, place_of, sign_by_device
from fl_core.link.tunnel.handshake import authorities

FLEET, VAN = "north", "van-1"
BODIES = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**60), 2**60)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> keys.PrivateKey:
    return keys.create_device_key(tmp_path_factory.mktemp("keys") / "device.key")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> tuple[CommandSigner, CommandReader]:
    folder = tmp_path_factory.mktemp("server")
    ca.create_ca(folder / "ca", FLEET)
    ca.issue_server_certificate(folder / "ca", folder / "tls", ["localhost"])
    der = ca.load_certificate(folder / "tls" / ca.SERVER_NAME).public_bytes(Encoding.DER)
    signer = CommandSigner(FLEET, der, keys.load_private_key(folder / "tls" / ca.SERVER_KEY_NAME))
    return signer, CommandReader(authorities(folder / "ca" / ca.CA_NAME))


def over_the_wire(message: Envelope) -> Envelope:
    return decode(encode(message), origin="topic")


@given(BODIES, st.integers(0, 2**40))
def test_what_a_device_signed_is_taken_and_nothing_else(
    key: keys.PrivateKey, body: dict[str, Any], number: int
) -> None:
    pem = keys.public_pem(key)
    sent = sign_by_device(
        Envelope(type="state", boot=3, connection=2, body=body), key, FLEET, VAN, topics.STATE, number=number
    )
    found = over_the_wire(sent)
    check_device(found, pem, FLEET, VAN, topics.STATE)
    assert place_of(found) == (3, 2, number)
    table = json.loads(encode(sent))
    changes: list[dict[str, Any]] = [
        {"type": "birth"}, {"id": "other"}, {"boot": 4}, {"connection": 3}, {"time": table["time"] + 1},
        {"number": number + 1}, {"body": {**body, "more": 1}}, {"extra": 1},
    ]  # fmt: skip
    for change in changes:
        altered = decode(json.dumps({**table, **change}).encode(), origin="topic")
        with pytest.raises(RefusedError, match="not valid"):
            check_device(altered, pem, FLEET, VAN, topics.STATE)
    for place in (("south", VAN, topics.STATE), (FLEET, "van-2", topics.STATE), (FLEET, VAN, topics.REPLY)):
        with pytest.raises(RefusedError, match="not valid"):
            check_device(found, pem, *place)


def test_a_device_without_a_key_or_a_signature_is_refused(key: keys.PrivateKey) -> None:
    plain = Envelope(type="birth")
    with pytest.raises(RefusedError, match="not signed"):
        check_device(plain, keys.public_pem(key), FLEET, VAN, topics.STATE)
    with pytest.raises(RefusedError, match="not registered"):
        check_device(sign_by_device(plain, key, FLEET, VAN, topics.STATE), None, FLEET, VAN, topics.STATE)


@given(BODIES)
def test_a_command_is_the_servers_for_this_device(
    server: tuple[CommandSigner, CommandReader], body: dict[str, Any]
) -> None:
    signer, reader = server
    found = over_the_wire(signer.sign(Envelope(type="update", id="job-1", body=body), VAN))
    reader.check(found, FLEET, VAN)
    for fleet, device in (("south", VAN), (FLEET, "van-2")):
        with pytest.raises(IntegrityError, match="not valid"):
            reader.check(found, fleet, device)
    table = json.loads(encode(found))
    for change in ({"id": "job-2"}, {"type": "infer"}, {"body": {**body, "more": 1}}, {"signature": "AAAA"}):
        with pytest.raises(IntegrityError):
            reader.check(decode(json.dumps({**table, **change}).encode(), origin="topic"), FLEET, VAN)


def test_another_authority_and_no_signature_are_refused(
    server: tuple[CommandSigner, CommandReader], tmp_path: Path
) -> None:
    signer, reader = server
    with pytest.raises(IntegrityError, match="missing"):
        reader.check(Envelope(type="update"), FLEET, VAN)
    ca.create_ca(tmp_path / "ca", FLEET)
    other = CommandReader(authorities(tmp_path / "ca" / ca.CA_NAME))
    with pytest.raises(IntegrityError, match="not of this device's authority"):
        other.check(signer.sign(Envelope(type="update"), VAN), FLEET, VAN)
