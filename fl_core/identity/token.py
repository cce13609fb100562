"""Enrolment tokens as people hand them around: one line that says where the server is, by which authority it is to be
known, and a secret that lets a few devices in for some days.

The secret is shown to a server only after its certificate was verified against the authority of this fingerprint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fl_core.contracts.errors import InputError, IntegrityError

PREFIX = "ff1."
LENGTH_LIMIT = 1_024
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class EnrolmentToken:
    """url: https://HOST:PORT. ca_sha256: of the authority's certificate (DER), hexadecimal."""

    url: str
    ca_sha256: str
    secret: str

    def text(self) -> str:
        data = json.dumps([self.url, self.ca_sha256, self.secret], separators=(",", ":")).encode()
        return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


def read_token(text: str) -> EnrolmentToken:
    """Raises InputError: not a token, or one that was cut off."""
    text = text.strip()
    try:
        if not text.startswith(PREFIX) or len(text) > LENGTH_LIMIT:
            raise ValueError
        body = text.removeprefix(PREFIX)
        found = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        url, ca_sha256, secret = found
        if not all(isinstance(part, str) for part in found):
            raise ValueError
        if not url.startswith("https://") or not _HEX64.fullmatch(ca_sha256) or not secret:
            raise ValueError
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise InputError(
            "this is not a whole enrolment token", remedy="copy the line that 'fieldfleet fleet token create' printed"
        ) from None
    return EnrolmentToken(url, ca_sha256, secret)


def certificate_sha256(pem: bytes, *, origin: str) -> str:
    """Raises IntegrityError when ``pem`` is not a certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise IntegrityError(f"{origin}: not a PEM certificate: {error}") from None
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
