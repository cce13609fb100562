"""Records through a broker that is not trusted: the device signs each batch, the server signs that it keeps it.

A broker can then neither alter nor invent a record, nor make a device let go of one that the server does not have. To
repeat an old batch or an old receipt does nothing: numbers only grow. The server's certificate travels once.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.identity import ca
from fl_core.identity.keys import PrivateKey, load_private_key
from fl_core.identity.signature import sign_statement, verify_statement
from fl_core.link.batch import RECORDS, Batch, from_text, taken_of, to_text, unpack
from fl_core.link.envelope import Envelope
from fl_core.link.signed import CommandReader, CommandSigner, check_device
from fl_core.link.tunnel.handshake import authorities, check_signed_by_server

CERTIFICATE_LIMIT = 8_192  # characters of base 64
HAVE_DIGITS = 32


def seal(data: bytes, key: PrivateKey, fleet: str, device: str, *, have: str) -> dict[str, Any]:
    """The body of a message with packed records. have: of ``ReceiptReader``."""
    return {"z": to_text(data), "s": sign_statement(key, RECORDS, fleet.encode(), device.encode(), data), "have": have}


@dataclass(frozen=True, kw_only=True)
class RecordGate:
    """The server's side. key_of(device) -> PEM of its public key, None for one that may not take part."""

    fleet: str
    certificate: bytes
    key: PrivateKey
    key_of: Callable[[str], bytes | None]

    @property
    def commands(self) -> CommandSigner:
        return CommandSigner(self.fleet, self.certificate, self.key)

    def check(self, message: Envelope, device: str, kind: str) -> None:
        """Raises RefusedError unless this device made it, for a topic of this kind."""
        check_device(message, self.key_of(device), self.fleet, device, kind)

    @classmethod
    def of_files(cls, fleet: str, certificate: Path, key: Path, key_of: Callable[[str], bytes | None]) -> RecordGate:
        der = ca.load_certificate(certificate).public_bytes(Encoding.DER)
        return cls(fleet=fleet, certificate=der, key=load_private_key(key), key_of=key_of)

    def open(self, body: dict[str, Any], device: str) -> Batch:
        """Raises RefusedError for a device or a signature that is not right, IntegrityError for what is no batch."""
        origin = f"records of {device}"
        data, signature, pem = from_text(body.get("z"), origin=origin), body.get("s"), self.key_of(device)
        if pem is None:
            raise RefusedError(f"{origin}: this device is not registered, or revoked")
        if not isinstance(signature, str):
            raise IntegrityError(f"{origin}: not signed")
        verify_statement(pem, signature, RECORDS, self.fleet.encode(), device.encode(), data)
        return unpack(data, origin=origin)

    def receipt(self, device: str, store: str, upto: int, *, have: object) -> dict[str, Any]:
        signature = self.key.sign(_content(self.fleet, device, store, upto), ec.ECDSA(hashes.SHA256()))
        body: dict[str, Any] = {"store": store, "upto": upto, "s": base64.b64encode(signature).decode()}
        if have != _digest(self.certificate):
            body["certificate"] = base64.b64encode(self.certificate).decode()
        return body


class ReceiptReader:
    """The device's side; remembers the server's certificate. ``have`` says which."""

    def __init__(self, ca_file: Path) -> None:
        self._authorities = authorities(ca_file)
        self._certificate = b""

    @property
    def commands(self) -> CommandReader:
        return CommandReader(self._authorities)

    @property
    def have(self) -> str:
        return _digest(self._certificate) if self._certificate else ""

    def read(self, body: dict[str, Any], fleet: str, device: str) -> tuple[str, int]:
        """(store, number). Raises IntegrityError unless this fleet's server signed it for this device."""
        store, upto = taken_of(body, origin="receipt")
        certificate = _decoded(body["certificate"]) if "certificate" in body else self._certificate
        check_signed_by_server(
            certificate, _decoded(body.get("s")), _content(fleet, device, store, upto), self._authorities
        )
        self._certificate = certificate
        return store, upto


def _content(fleet: str, device: str, store: str, upto: int) -> bytes:
    """Names hold no line breaks."""
    return "\n".join(("fieldfleet receipt 1", fleet, device, store, str(upto))).encode()


def _digest(certificate: bytes) -> str:
    return hashlib.sha256(certificate).hexdigest()[:HAVE_DIGITS]


def _decoded(text: object) -> bytes:
    try:
        if not isinstance(text, str) or len(text) > CERTIFICATE_LIMIT:
            raise ValueError("missing, or too long")
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise IntegrityError(f"receipt: its signature or certificate is {error}") from None
