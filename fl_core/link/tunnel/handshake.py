"""The handshake: fresh X25519 keys on both sides, signed by the server's certificate and by the device's own key.

Both signatures and the keys cover one transcript: fleet, device, the device's key, session, both ephemeral keys and the
certificate. So neither side can be made to believe in another partner, another device or another session than the
other one does, and a recorded handshake cannot be used again (SIGMA's rules; H. Krawczyk, CRYPTO 2003).
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID

from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.identity.keys import PrivateKey, canonical_public_pem, public_pem
from fl_core.link.tunnel import packets
from fl_core.link.tunnel.packets import Kind, Packet

RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw
KEY_BYTES, DIGEST_BYTES = 32, 32
PROTOCOL = b"fieldfleet tunnel 1"
BY_SERVER, BY_DEVICE = b"fieldfleet tunnel 1: server", b"fieldfleet tunnel 1: device"
HASH = ec.ECDSA(hashes.SHA256())


class UntrustedServer(IntegrityError):
    """The certificate is not of this device's authority or out of date, or the signature is not its owner's."""


@dataclass(frozen=True)
class Place:
    """Between whom a tunnel is: the names in its topics."""

    fleet: str
    device: str


@dataclass(frozen=True)
class Keys:
    """256 bits for each direction."""

    send: bytes = field(repr=False)
    receive: bytes = field(repr=False)


def transcript(place: Place, session: bytes, device_key: bytes, device: bytes, server: bytes, der: bytes) -> bytes:
    """device_key: SHA-256 of the PEM. device, server: the ephemeral keys. Returns 32 bytes."""
    parts = (PROTOCOL, place.fleet.encode(), place.device.encode(), session, device_key, device, server, der)
    return hashlib.sha256(packets.write_parts(*parts)).digest()


def _derive(private: X25519PrivateKey, other: bytes, bound: bytes) -> bytes:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise IntegrityError("the other side's ephemeral key is not usable") from None
    return HKDF(hashes.SHA256(), 2 * KEY_BYTES, salt=bound, info=PROTOCOL).derive(shared)


def digest(pem: bytes) -> bytes:
    return hashlib.sha256(pem).digest()


class DeviceHandshake:
    """hello() -> packet; finish(SERVER_HELLO) -> packet and keys. One object, one session."""

    def __init__(self, place: Place, key: PrivateKey, authorities: list[x509.Certificate]) -> None:
        self.session = secrets.token_bytes(packets.SESSION_BYTES)
        self._place, self._key, self._authorities = place, key, authorities
        self._pem, self._private = public_pem(key), X25519PrivateKey.generate()
        self._public = self._private.public_key().public_bytes(*RAW)

    def hello(self) -> bytes:
        return packets.header(Kind.HELLO, self.session) + self._public + digest(self._pem)

    def finish(self, answer: Packet, *, now: datetime.datetime | None = None) -> tuple[bytes, Keys]:
        """Raises UntrustedServer, or IntegrityError for what is no answer at all."""
        server, rest = answer.body[:KEY_BYTES], answer.body[KEY_BYTES:]
        parts = packets.read_parts(rest, origin="tunnel")
        if answer.session != self.session or len(server) != KEY_BYTES or len(parts) != 2:
            raise IntegrityError("tunnel: not an answer to this hello")
        der, signature = parts
        bound = transcript(self._place, self.session, digest(self._pem), self._public, server, der)
        check_signed_by_server(der, signature, BY_SERVER + bound, self._authorities, now=now)
        material = _derive(self._private, server, bound)
        proof = packets.write_parts(self._pem, self._key.sign(BY_DEVICE + bound, HASH))
        keys = Keys(send=material[:KEY_BYTES], receive=material[KEY_BYTES:])
        return packets.header(Kind.FINISH, self.session) + proof, keys


class ServerHandshake:
    """The answer to one HELLO; ``finish`` gives the device's key and the session's keys."""

    def __init__(self, place: Place, hello: Packet, certificate: bytes, key: PrivateKey) -> None:
        """certificate: DER. Raises IntegrityError for what is no hello."""
        if len(hello.body) != KEY_BYTES + DIGEST_BYTES:
            raise IntegrityError("tunnel: not a hello")
        self.session, self.hello = hello.session, hello.body
        device, self._device_key = hello.body[:KEY_BYTES], hello.body[KEY_BYTES:]
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes(*RAW)
        self._bound = transcript(place, self.session, self._device_key, device, public, certificate)
        self._material = _derive(private, device, self._bound)
        parts = packets.write_parts(certificate, key.sign(BY_SERVER + self._bound, HASH))
        self.answer = packets.header(Kind.SERVER_HELLO, self.session) + public + parts

    def finish(self, proof: Packet) -> tuple[bytes, Keys]:
        """(canonical PEM of the device's public key, keys). Raises IntegrityError for a proof that is none."""
        parts = packets.read_parts(proof.body, origin="tunnel")
        if len(parts) != 2 or digest(parts[0]) != self._device_key:
            raise IntegrityError("tunnel: the proof is of another key than the hello")
        pem = canonical_public_pem(parts[0], origin="tunnel")
        public = serialization.load_pem_public_key(pem)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        try:
            public.verify(parts[1], BY_DEVICE + self._bound, HASH)
        except InvalidSignature:
            raise IntegrityError("tunnel: the device's signature is not valid") from None
        return pem, Keys(send=self._material[KEY_BYTES:], receive=self._material[:KEY_BYTES])


def authorities(path: Path) -> list[x509.Certificate]:
    """The certificates of a CA file. Raises InputError or IntegrityError naming it."""
    if not path.is_file():
        raise InputError(f"{path}: no such CA file", remedy="copy HOME/ca/ca.pem from the server")
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: not a PEM certificate: {error}") from None


def check_signed_by_server(
    der: bytes,
    signature: bytes,
    content: bytes,
    trusted: list[x509.Certificate],
    *,
    now: datetime.datetime | None = None,
) -> None:
    """Raises UntrustedServer unless a server's certificate, issued directly by a trusted authority and valid now, signed."""
    moment = now or datetime.datetime.now(datetime.UTC)
    try:
        certificate = x509.load_der_x509_certificate(der)
        issuer = next((ca for ca in trusted if _issued(certificate, ca)), None)
        if issuer is None:
            raise UntrustedServer("the server's certificate is not of this device's authority")
        for found in (issuer, certificate):
            if not found.not_valid_before_utc <= moment <= found.not_valid_after_utc:
                raise UntrustedServer(
                    f"the server's certificate is not valid now ({found.not_valid_before_utc:%Y-%m-%d} to "
                    f"{found.not_valid_after_utc:%Y-%m-%d}; it is {moment:%Y-%m-%d})",
                    remedy="set this device's clock, or on the server: fieldfleet server renew",
                )
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if ExtendedKeyUsageOID.SERVER_AUTH not in usage:
            raise UntrustedServer("the certificate is not a server's")
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise UntrustedServer("the server's certificate has no elliptic curve key")
        key.verify(signature, content, HASH)
    except InvalidSignature:
        raise UntrustedServer("the server's signature is not valid") from None
    except (ValueError, x509.ExtensionNotFound) as error:
        raise UntrustedServer(f"the server's certificate is not usable: {error}") from None


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
