"""The three headers with which Flower's Fleet API authenticates a device, made and verified.

``flwr-public-key`` (base64 of the PEM), ``flwr-timestamp`` (ISO 8601) and ``flwr-signature`` (base64 of an ECDSA
signature, SHA-256, over the timestamp). They prove possession of the key for 300 s and say nothing of the body:
they are only ever sent inside TLS.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.identity.keys import PrivateKey, canonical_public_pem, public_pem

PUBLIC_KEY, TIMESTAMP, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"
VALID_SECONDS = 300
DRIFT_SECONDS = 5
RENEW_SECONDS = 100
SKEW_SECONDS = 60.0  # a device's clock may differ so much before it is corrected
HEADER_LIMIT = 2048


class HeaderSigner:
    """Headers for one key, signed anew every 100 s: a P-384 signature costs a small device milliseconds.

    A clock that differs from the server's by more than a minute is corrected here, and nowhere else on the device.
    """

    def __init__(self, key: PrivateKey) -> None:
        self._key, self._made, self._headers = key, float("-inf"), dict[str, str]()
        self._lock = threading.Lock()
        self.public_pem = public_pem(key)
        self.skew_s: float | None = None  # this device's clock minus the server's, as last seen
        self.offset_s = 0.0  # what is added to this device's clock in signatures

    def headers(self) -> dict[str, str]:
        with self._lock:
            if time.monotonic() - self._made > RENEW_SECONDS:
                stamp = datetime.datetime.fromtimestamp(time.time() + self.offset_s, datetime.UTC)
                self._headers, self._made = sign(self._key, now=stamp), time.monotonic()
            return dict(self._headers)

    def observe(self, server_time: float) -> bool:
        """Note what time it is at the server (seconds since 1970). True when signatures are corrected otherwise now."""
        with self._lock:
            self.skew_s = time.time() - server_time
            offset = -self.skew_s if abs(self.skew_s) > SKEW_SECONDS else 0.0
            if abs(offset - self.offset_s) <= SKEW_SECONDS / 2:
                return False
            self.offset_s, self._made = offset, float("-inf")
            return True

    def clock_facts(self) -> dict[str, float | None]:
        skew = self.skew_s
        return {"skew_s": None if skew is None else round(skew, 1), "corrected_s": round(self.offset_s, 1)}


def sign(key: PrivateKey, *, now: datetime.datetime | None = None) -> dict[str, str]:
    stamp = (now or datetime.datetime.now(datetime.UTC)).isoformat()
    signature = key.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    return {
        PUBLIC_KEY: base64.b64encode(public_pem(key)).decode(),
        TIMESTAMP: stamp,
        SIGNATURE: base64.b64encode(signature).decode(),
    }


class Verifier:
    """``verify`` with a memory: a device repeats one signature for 100 s, and checking it costs about a millisecond."""

    def __init__(self, size: int = 4096) -> None:
        self._size, self._known = size, OrderedDict[tuple[str, str, str], bytes]()
        self._lock = threading.Lock()

    def verify(self, headers: Mapping[str, str]) -> bytes:
        triple = (headers.get(PUBLIC_KEY, ""), headers.get(TIMESTAMP, ""), headers.get(SIGNATURE, ""))
        with self._lock:
            known = self._known.get(triple)
        if known is not None:
            _check_age(triple[1], None)
            return known
        pem = verify(headers)
        with self._lock:
            self._known[triple] = pem
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return pem


def sign_statement(key: PrivateKey, purpose: str, *parts: bytes) -> str:
    """base64 of a signature over a purpose and what it concerns: needs no clock, and is of no use for anything else."""
    return base64.b64encode(key.sign(_statement(purpose, parts), ec.ECDSA(hashes.SHA256()))).decode()


def verify_statement(pem: bytes, signature: str, purpose: str, *parts: bytes) -> None:
    """Raises RefusedError unless the key made this statement."""
    try:
        key = load_pem_public_key(pem)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        given = base64.b64decode(signature, validate=True)
        key.verify(given, _statement(purpose, parts), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        raise RefusedError(f"the signature for {purpose} is not valid") from None


def _statement(purpose: str, parts: tuple[bytes, ...]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in (b"fieldfleet", purpose.encode(), *parts))


def verify(headers: Mapping[str, str], *, now: datetime.datetime | None = None) -> bytes:
    """The canonical PEM of the key that signed these headers. Raises RefusedError saying why not."""
    pem = _decode(headers, PUBLIC_KEY)
    stamp = headers.get(TIMESTAMP, "")
    _check_age(stamp, now)
    try:
        pem = canonical_public_pem(pem, origin=f"header {PUBLIC_KEY}")
        key = load_pem_public_key(pem)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(_decode(headers, SIGNATURE), stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (IntegrityError, InvalidSignature, UnicodeError) as error:
        raise RefusedError(f"the request's signature is not valid: {error}") from None
    return pem


def _check_age(stamp: str, now: datetime.datetime | None) -> None:
    try:
        age = ((now or datetime.datetime.now(datetime.UTC)) - datetime.datetime.fromisoformat(stamp)).total_seconds()
    except (ValueError, TypeError):
        raise RefusedError(f"header {TIMESTAMP} is missing or not a time with a zone") from None
    if not -DRIFT_SECONDS < age < VALID_SECONDS + DRIFT_SECONDS:
        raise RefusedError(
            f"the request was signed {abs(age):.0f} s {'ago' if age > 0 else 'in the future'}",
            remedy="set the device's clock",
        )


def _decode(headers: Mapping[str, str], name: str) -> bytes:
    value = headers.get(name, "")
    try:
        if not value or len(value) > HEADER_LIMIT:
            raise ValueError
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise RefusedError(f"header {name} is missing or not base64") from None
