"""Names that rooms and devices agree on, and the rule for names of clients and devices."""

from __future__ import annotations

import ipaddress
import re

from fl_core.contracts.errors import InputError

DATA_ENVIRONMENT_VARIABLE = "FIELDFLEET_DATA"
DEFAULT_SERVER_PORT = 8433
DEFAULT_MQTT_PORT = 8883
DEFAULT_GRPC_PORT = 8001
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(name: str, kind: str = "name") -> str:
    """Names become topic levels, file names and certificate subjects: letters, digits, . _ - only."""
    if not NAME_PATTERN.fullmatch(name):
        raise InputError(
            f"{kind} {name!r} is not usable",
            remedy="use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit",
        )
    return name


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine; names other than ``localhost`` are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
