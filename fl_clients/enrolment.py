"""How a device becomes one of the fleet with a token, and how it changes its key later. Standard library, cryptography."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric import ec

from fl_clients.connection import Answer, Unreachable, Unregistered, open_transport, welcome
from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.contracts.names import DEFAULT_SERVER_PORT
from fl_core.identity import keys
from fl_core.identity.signature import sign_statement
from fl_core.identity.token import EnrolmentToken, certificate_sha256
from fl_core.storage import atomic

if TYPE_CHECKING:
    from fl_clients.connection import Transport
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.settings import AgentSettings

AUTHORITY_PATH = "/fieldfleet/v1/authority"
ENROL_PATH = "/fieldfleet/v1/enrol"
ROTATE_PATH = "/fieldfleet/v1/rotate-key"
ENROL, ROTATE = "enrol", "rotate-key"
LIMIT = 65_536
TIMEOUT_S = 20.0


def fetch_authority(token: EnrolmentToken) -> bytes:
    """The CA certificate (PEM) that the token names by its fingerprint.

    The connection that brings it is trusted with nothing, and nothing is sent over it: only what fits the fingerprint
    is taken. Raises RefusedError (no answer, another authority) or IntegrityError.
    """
    parts = urllib.parse.urlsplit(token.url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port or DEFAULT_SERVER_PORT, timeout=TIMEOUT_S, context=context
    )
    try:
        connection.request("GET", AUTHORITY_PATH)
        response = connection.getresponse()
        answer = Answer(response.status, response.read(LIMIT), {})
    except (OSError, http.client.HTTPException) as error:
        raise RefusedError(f"no answer from {token.url}: {error}", remedy="is it running, and its port open?") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise RefusedError(f"{token.url}: {answer.reason()}")
    pem = _text(answer, "ca", token.url).encode()
    if certificate_sha256(pem, origin=token.url) != token.ca_sha256:
        raise RefusedError(
            f"{token.url}: its authority is not the one of the token",
            remedy="another server answers at this address, or the token is of another fleet",
        )
    return pem


@dataclass(frozen=True)
class Enrolled:
    """status: "active", or "pending" until an operator approves."""

    name: str
    fleet: str
    status: str


def enrol(connection: Transport, token: EnrolmentToken, key: keys.PrivateKey, name: str) -> Enrolled:
    """Show the token and the public key. Raises RefusedError with the server's reason; may be repeated."""
    pem = keys.public_pem(key)
    proof = sign_statement(key, ENROL, token.secret.encode(), name.encode(), pem)
    body = {"token": token.secret, "name": name, "public_key": pem.decode("ascii"), "proof": proof}
    answer = _post(connection, ENROL_PATH, body)
    found = [_text(answer, field, connection.url) for field in ("name", "fleet", "status")]
    return Enrolled(*found)


def new_key_file(home: AgentHome) -> Path:
    return home.key_file.with_suffix(".key.new")


def rotate_key(home: AgentHome, connect: Transport) -> str:
    """Replace the device's key on both sides; returns the new fingerprint. ``connect`` signs with the present key.

    The new key is on disk before the server hears of it, and takes the old one's place after the server took it: a
    crash in between leaves both, and ``settle_rotation`` finds out which one counts.
    """
    old, file = keys.load_private_key(home.key_file), new_key_file(home)
    if not file.is_file():
        keys.write_private_key(file, ec.generate_private_key(ec.SECP384R1()))
    new = keys.load_private_key(file)
    pems = keys.public_pem(old), keys.public_pem(new)
    body = {
        "public_key": pems[1].decode("ascii"),
        "proof": sign_statement(new, ROTATE, *pems),
        "consent": sign_statement(old, ROTATE, *pems),
    }
    _post(connect, ROTATE_PATH, body)
    _adopt(home)
    return keys.fingerprint(pems[1])


def settle_rotation(home: AgentHome, settings: AgentSettings) -> None:
    """After a crash in mid-rotation: if the server knows the new key, it is the device's key from now on.

    Without an answer both keys stay, and the next start asks again.
    """
    file = new_key_file(home)
    if not file.is_file():
        return
    connection = open_transport(home, settings, keys.load_private_key(file))
    try:
        welcome(connection)
    except (Unregistered, Unreachable, RefusedError, IntegrityError):
        return
    finally:
        connection.close()
    _adopt(home)


def _adopt(home: AgentHome) -> None:
    file = new_key_file(home)
    public = keys.public_pem(keys.load_private_key(file))
    os.replace(file, home.key_file)
    atomic.fsync_folder(home.key_file.parent)
    atomic.write_bytes(home.public_key_file, public)


def _post(connection: Transport, path: str, body: dict[str, Any]) -> Answer:
    try:
        answer = connection.request("POST", path, json.dumps(body).encode(), limit=LIMIT, timeout=TIMEOUT_S)
    except Unreachable as error:
        raise RefusedError(f"no answer: {error}", remedy="is the server running? try again") from None
    if answer.status != 200:
        raise RefusedError(f"{connection.url} refuses: {answer.reason()}")
    return answer


def _text(answer: Answer, field: str, origin: str) -> str:
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        value = json.loads(answer.body)[field]
        if isinstance(value, str) and len(value) < LIMIT:
            return value
    raise IntegrityError(f"{origin}: the answer lacks {field!r}")
