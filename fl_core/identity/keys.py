"""Device keys: ECDSA on P-384, made on the device, never leaving it. Flower's node authentication uses the same kind."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.storage import atomic

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
KEY_LIMIT = 16_384


def create_device_key(path: Path) -> PrivateKey:
    """Make a key at ``path`` (mode 0600) and its public half at ``path`` with the suffix ``.pub``.

    Raises InputError when there is a key already: a device keeps its key for life.
    """
    if path.exists():
        raise InputError(f"{path}: a key is there already", remedy="keep it, or remove it to become a new device")
    key = ec.generate_private_key(ec.SECP384R1())
    write_private_key(path, key)
    atomic.write_bytes(path.with_suffix(".pub"), public_pem(key))
    return key


def write_private_key(path: Path, key: PrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    atomic.write_bytes(path, data, mode=0o600)


def load_private_key(path: Path) -> PrivateKey:
    """Raises InputError (no such file), EnvironmentFault (others may read it) or IntegrityError (no such key in it)."""
    if not path.is_file():
        raise InputError(f"{path}: no such key")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise EnvironmentFault(f"{path}: other users may read this private key", remedy=f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(_bounded(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{path}: not a PEM private key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IntegrityError(f"{path}: not an elliptic curve key")
    return key


def public_pem(key: PrivateKey | PublicKey) -> bytes:
    """PEM SubjectPublicKeyInfo: the one spelling of a public key on the wire and in the registry."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_public_key(path: Path) -> bytes:
    """The canonical PEM of a device's public key file (PEM or OpenSSH). Raises InputError or IntegrityError."""
    if not path.is_file():
        raise InputError(f"{path}: no such public key", remedy="copy the device's keys/device.pub here")
    return canonical_public_pem(_bounded(path), origin=str(path))


def canonical_public_pem(data: bytes, *, origin: str) -> bytes:
    """Raises IntegrityError unless ``data`` is a public key on P-384, in PEM or OpenSSH form."""
    if b"PRIVATE KEY" in data:
        raise IntegrityError(
            f"{origin}: this is a private key", remedy="give the .pub file; keep this one on its device"
        )
    try:
        load = serialization.load_ssh_public_key if data.startswith(b"ecdsa-") else serialization.load_pem_public_key
        key: object = load(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{origin}: not a public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IntegrityError(f"{origin}: not an ECDSA key on the curve P-384", remedy="run 'fieldfleet agent init'")
    return public_pem(key)


def fingerprint(pem: bytes) -> str:
    """sha256 of the canonical PEM, 32 hexadecimal digits: for people, logs and file names."""
    return hashlib.sha256(pem).hexdigest()[:32]


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(KEY_LIMIT)
