"""States, replies and commands through a broker that is not trusted: signed by who made them, each counted once.

A signature covers the whole message but itself, its fleet, device and kind of topic, so that nothing can be altered, sent
on in another's name or put on another topic. What is repeated is found out by what the message says of its place:
states by (boot, connection, number), replies and commands by the id of their job. Wake-ups and what a device should be
(``desired``) are not signed: they only make a device ask its server, or read the signed repository, sooner.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.identity.keys import PrivateKey
from fl_core.identity.signature import sign_statement, verify_statement
from fl_core.link.envelope import COUNTER_LIMIT, Envelope, encode
from fl_core.link.tunnel.handshake import check_signed_by_server

SIGNATURE, CERTIFICATE, NUMBER = "signature", "certificate", "number"
TEXT_LIMIT = 8_192  # characters of base 64


def sign_by_device(
    message: Envelope, key: PrivateKey, fleet: str, device: str, kind: str, *, number: int = 0
) -> Envelope:
    """number: of this message among the states of its connection, ascending."""
    numbered = replace(message, unknown={**message.unknown, NUMBER: number})
    signature = sign_statement(key, f"mqtt {kind}", fleet.encode(), device.encode(), _content(numbered))
    return replace(numbered, unknown={**numbered.unknown, SIGNATURE: signature})


def check_device(message: Envelope, pem: bytes | None, fleet: str, device: str, kind: str) -> None:
    """Raises RefusedError unless the owner of this public key (None: nobody) made it for this topic."""
    if pem is None:
        raise RefusedError(f"{kind} of {device}: this device is not registered, or revoked")
    signature = message.unknown.get(SIGNATURE)
    if not isinstance(signature, str) or len(signature) > TEXT_LIMIT:
        raise RefusedError(f"{kind} of {device}: not signed", remedy="upgrade fieldfleet on that device")
    verify_statement(pem, signature, f"mqtt {kind}", fleet.encode(), device.encode(), _content(message))


def place_of(message: Envelope) -> tuple[int, int, int]:
    """(boot, connection, number): ascending in what a device says of its state."""
    number = message.unknown.get(NUMBER, 0)
    if type(number) is not int or not 0 <= number < COUNTER_LIMIT:
        raise IntegrityError(f"field {NUMBER!r} must be an integer of at least 0")
    return (*message.order, number)


@dataclass(frozen=True)
class CommandSigner:
    """The server's side: its certificate (DER) and key."""

    fleet: str
    certificate: bytes
    key: PrivateKey

    def sign(self, message: Envelope, device: str) -> Envelope:
        signature = self.key.sign(_command(message, self.fleet, device), ec.ECDSA(hashes.SHA256()))
        said = {SIGNATURE: _text(signature), CERTIFICATE: _text(self.certificate)}
        return replace(message, unknown={**message.unknown, **said})


@dataclass(frozen=True)
class CommandReader:
    """The device's side. trusted: its fleet's authorities, as ``handshake.authorities`` reads them."""

    trusted: list[x509.Certificate]

    def check(self, message: Envelope, fleet: str, device: str) -> None:
        """Raises IntegrityError unless this fleet's server made this command for this device."""
        certificate, signature = (_bytes(message.unknown.get(name), name) for name in (CERTIFICATE, SIGNATURE))
        check_signed_by_server(certificate, signature, _command(message, fleet, device), self.trusted)


def _command(message: Envelope, fleet: str, device: str) -> bytes:
    """Names hold no line breaks."""
    return b"\n".join((b"fieldfleet command 1", fleet.encode(), device.encode(), _content(message)))


def _content(message: Envelope) -> bytes:
    """The same bytes on both sides: what was encoded, decoded and encoded again does not change."""
    unknown = {name: value for name, value in message.unknown.items() if name not in (SIGNATURE, CERTIFICATE)}
    return encode(replace(message, unknown=unknown))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any, name: str) -> bytes:
    try:
        if not isinstance(text, str) or len(text) > TEXT_LIMIT:
            raise ValueError("missing, or too long")
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise IntegrityError(f"command: its {name} is {error}") from None
