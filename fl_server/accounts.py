"""MQTT accounts: devices from the registry, and two of the server's own, whose passwords lie in HOME/broker (0600)."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from fl_core.contracts.errors import EnvironmentFault
from fl_core.link.topics import OPERATOR_ACCOUNT, SERVICE_ACCOUNTS
from fl_core.storage import atomic
from fl_server.broker import Lookup
from fl_server.registry import Registry

ACCOUNTS_NAME = "accounts.json"


def service_passwords(folder: Path) -> dict[str, str]:
    """account -> password of the server and of its operators; made at the first call, kept from then on.

    Raises EnvironmentFault when the file is not one of ours.
    """
    file = folder / ACCOUNTS_NAME
    if not file.exists():
        atomic.write_json(file, {name: secrets.token_urlsafe(24) for name in SERVICE_ACCOUNTS}, mode=0o600)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return {name: _password(table[name]) for name in SERVICE_ACCOUNTS}
    except (OSError, ValueError, KeyError, TypeError):
        raise EnvironmentFault(
            f"{file}: not readable as the server's MQTT accounts",
            remedy="remove it: a new one is made at the next start",
        ) from None


def _password(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a password")
    return value


def lookup(registry: Registry, services: dict[str, str]) -> Lookup:
    """account -> password, asked at each connection. Names of service accounts can never be device names."""
    return lambda name: services[name] if name in services else registry.mqtt_password(name)


def all_accounts(registry: Registry, services: dict[str, str]) -> dict[str, str]:
    devices = {device.name: device.mqtt_password for device in registry.devices() if device.active}
    return {**services, **devices}


def operator(services: dict[str, str]) -> tuple[str, str]:
    return OPERATOR_ACCOUNT, services[OPERATOR_ACCOUNT]
