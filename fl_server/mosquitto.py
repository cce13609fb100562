"""Configuration files for an external mosquitto 2: accounts, access rules, TLS. The operator copies them or points at them.

The password file holds mosquitto's own salted hashes (``$7$``: PBKDF2-HMAC-SHA512), so that it may leave the server;
the access rules are those of ``fl_core.link.topics``, written with mosquitto's ``%u`` patterns.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_core.link import topics
from fl_core.storage import atomic

PASSWORDS_NAME, ACCESS_NAME, CONFIG_NAME = "passwords", "access.acl", "mosquitto.conf"
ITERATIONS = 101  # mosquitto_passwd's default; our passwords are random and 32 characters long
SALT_BYTES = 12
PACKET_LIMIT = 128 * 1024


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Where mosquitto listens. Without a certificate it serves plain TCP."""

    port: int
    host: str = ""
    certificate: Path | None = None
    key: Path | None = None


def password_entry(name: str, password: str, *, salt: bytes | None = None, iterations: int = ITERATIONS) -> str:
    """One line of mosquitto's password file."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"{name}:$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def access_rules(fleet: str) -> str:
    """mosquitto's ACL file: what ``topics.may`` says, for a broker that cannot ask it."""
    lines = ["# Every device: its own topics, each in its own direction."]
    lines += [f"pattern write {topics.PREFIX}/{fleet}/devices/%u/{kind}" for kind in topics.FROM_DEVICE]
    lines += [f"pattern read {topics.PREFIX}/{fleet}/devices/%u/{kind}" for kind in topics.TO_DEVICE]
    for account in topics.SERVICE_ACCOUNTS:
        lines += ["", f"user {account}"]
        lines += [f"topic read {topics.every_device(fleet, kind)}" for kind in topics.FROM_DEVICE]
        lines += [f"topic write {topics.every_device(fleet, kind)}" for kind in topics.TO_DEVICE]
    return "\n".join(lines) + "\n"


def configuration(folder: Path, listener: Listener) -> str:
    lines = [
        "# Written by fieldfleet; 'fieldfleet fleet register' writes it anew: keep your own settings in another file.",
        "# mosquitto started by root runs as the user 'mosquitto', who must be able to read these files.",
        "per_listener_settings false",
        f"listener {listener.port} {listener.host}".rstrip(),
        "allow_anonymous false",
        f"password_file {folder / PASSWORDS_NAME}",
        f"acl_file {folder / ACCESS_NAME}",
        "# One connection a device, under its own name: nobody can end another's connection.",
        "use_username_as_clientid true",
        "# Requests and answers are short messages that somebody waits for.",
        "set_tcp_nodelay true",
        f"max_packet_size {PACKET_LIMIT}",
        "max_queued_messages 10000",
        "persistence true",
        f"persistence_location {folder}/",
    ]
    if listener.certificate is not None and listener.key is not None:
        lines += [f"certfile {listener.certificate}", f"keyfile {listener.key}", "tls_version tlsv1.2"]
    return "\n".join(lines) + "\n"


def write_files(folder: Path, *, fleet: str, accounts: Mapping[str, str], listener: Listener) -> Path:
    """passwords (0600), access.acl and mosquitto.conf in ``folder``. Returns the path of mosquitto.conf.

    A running mosquitto reads accounts and rules again on SIGHUP.
    """
    folder = folder.resolve()
    entries = [password_entry(name, password) for name, password in sorted(accounts.items())]
    atomic.write_bytes(folder / PASSWORDS_NAME, ("\n".join(entries) + "\n").encode(), mode=0o600)
    atomic.write_bytes(folder / ACCESS_NAME, access_rules(fleet).encode(), mode=0o600)
    atomic.write_bytes(folder / CONFIG_NAME, configuration(folder, listener).encode())
    return folder / CONFIG_NAME
