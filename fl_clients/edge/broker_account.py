"""The broker's account as its operator handed it over, for devices that never saw the server over HTTPS.

HOME/keys/broker.json (0600), made on the server by ``fieldfleet server account NAME``: {"broker": {host, port, tls,
username, password, fleet}}. The account's name is the device's registered name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fl_clients.connection import Welcome
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError, InputError
from fl_core.contracts.names import checked_name
from fl_core.storage import atomic

LIMIT = 16_384
FIELDS = {"host": str, "port": int, "tls": bool, "username": str, "password": str, "fleet": str}


def read_account(file: Path) -> dict[str, Any] | None:
    """The fields above; None where there is no such file. Raises EnvironmentFault (readable by others) or InputError."""
    try:
        if file.stat().st_mode & 0o077:
            raise EnvironmentFault(f"{file}: other users may read this password", remedy=f"chmod 600 {file}")
        with file.open(encoding="utf-8") as stream:
            text = stream.read(LIMIT)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentFault(f"{file}: not readable: {error}") from None
    return parse_account(text, origin=str(file))


def parse_account(text: str, *, origin: str) -> dict[str, Any]:
    """Raises InputError naming the field."""
    try:
        table = json.loads(text)["broker"]
        for name, kind in FIELDS.items():
            if type(table[name]) is not kind:
                raise ValueError(f"field {name!r} must be of type {kind.__name__}")
        checked_name(table["username"], "username")
        checked_name(table["fleet"], "fleet")
        if not table["host"] or not table["password"] or not 0 < table["port"] < 65_536:
            raise ValueError("host, port and password must be given")
    except FieldfleetError as error:
        raise InputError(f"{origin}: {error.message}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{origin}: not a broker account: {error}", remedy="on the server: fieldfleet server account NAME"
        ) from None
    return {name: table[name] for name in FIELDS}


def write_account(file: Path, account: dict[str, Any]) -> None:
    atomic.write_json(file, {"broker": account}, mode=0o600)


def as_welcome(account: dict[str, Any]) -> Welcome:
    """Whom the device takes itself for until the server has said who it is."""
    return Welcome(
        name=account["username"],
        fleet=account["fleet"],
        node_id=0,
        mqtt=broker_of(account),
        repository="",
        tuf_root=None,
        time=0.0,
    )


def broker_of(account: dict[str, Any]) -> dict[str, Any]:
    """What a welcome says under "mqtt"."""
    return {name: account[name] for name in ("host", "port", "tls", "username", "password")}
