"""The signing keys of a repository: one Ed25519 key for each of TUF's four roles, in a folder of mode 0700."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.storage import atomic

ROLES = ("root", "targets", "snapshot", "timestamp")


def default_keys(repository: Path) -> Path:
    """A sibling of the repository, so that serving the repository never serves the keys."""
    whole = Path(os.path.abspath(repository))
    return whole.with_name(f"{whole.name}-keys")


def check_place(keys: Path, repository: Path) -> None:
    """Raises InputError when the keys would lie inside the folder that is served."""
    inner, outer = keys.resolve(), repository.resolve()
    if inner == outer or outer in inner.parents:
        raise InputError(
            f"--keys {keys}: lies inside the repository {repository}, which is served to devices",
            remedy="name a folder outside of it",
        )


def create_keys(folder: Path) -> dict[str, CryptoSigner]:
    """All four at once: the folder appears whole or not at all."""
    signers = {role: CryptoSigner.generate_ed25519() for role in ROLES}
    with atomic.new_folder(folder) as temporary:
        temporary.chmod(0o700)
        for role, signer in signers.items():
            atomic.write_bytes(temporary / f"{role}.pem", signer.private_bytes, mode=0o600)
    return signers


def load_keys(folder: Path) -> dict[str, CryptoSigner]:
    """Raises EnvironmentFault (missing, or readable by others) or IntegrityError (no Ed25519 key)."""
    signers = {}
    for role in ROLES:
        path = folder / f"{role}.pem"
        if not path.is_file():
            raise EnvironmentFault(
                f"{path}: the signing key is missing",
                remedy="restore the key folder from its backup and name it with --keys; if it is lost, make a new "
                "repository and hand its metadata/1.root.json to every device",
            )
        if path.stat().st_mode & 0o077:
            raise EnvironmentFault(
                f"{path}: the signing key is readable by others", remedy=f"chmod 700 {folder}; chmod 600 {folder}/*"
            )
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"{path}: not a readable private key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise IntegrityError(f"{path}: not an Ed25519 key")
        signers[role] = CryptoSigner(key)
    return signers
