"""The door for devices that are not known yet: the authority's certificate, enrolment by token, and the rotation of keys.

The first two are open to everyone who reaches the port: what they take is small, and each address may come rarely.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from fl_core.contracts.errors import FieldfleetError, InputError
from fl_core.flower.wire import FleetRefused
from fl_core.identity.keys import canonical_public_pem
from fl_core.identity.signature import verify_statement
from fl_server.directory import Caller
from fl_server.registry import Device, Registry

AUTHORITY_PATH = "/fieldfleet/v1/authority"
ENROL_PATH = "/fieldfleet/v1/enrol"
ROTATE_PATH = "/fieldfleet/v1/rotate-key"
ENROL, ROTATE = "enrol", "rotate-key"  # purposes of the signed statements
BODY_LIMIT = 8_192
FIELD_LIMIT = 4_096


class RateLimit:
    """A bucket of ``burst`` tokens for each address, refilled with ``per_minute``; the busiest addresses are kept."""

    def __init__(
        self, *, per_minute: float, burst: int, size: int = 4_096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._size, self._clock = per_minute / 60, burst, size, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allow(self, address: str) -> bool:
        with self._lock:
            now = self._clock()
            left, at = self._buckets.pop(address, (float(self._burst), now))
            left = min(float(self._burst), left + (now - at) * self._rate)
            self._buckets[address] = (max(0.0, left - 1), now) if left >= 1 else (left, now)
            while len(self._buckets) > self._size:
                self._buckets.popitem(last=False)
            return left >= 1


class Doorman:
    """``changed(device)``: a device came in or has another key."""

    def __init__(self, registry: Registry, fleet: str, ca_pem: bytes, changed: Callable[[Device], None]) -> None:
        self._registry, self._fleet, self._ca, self._changed = registry, fleet, ca_pem, changed
        self._each = RateLimit(per_minute=30, burst=20)
        self._all = RateLimit(per_minute=1_200, burst=600)

    def authority(self, address: str) -> dict[str, Any]:
        self._admit(address)
        return {"ca": self._ca.decode("ascii"), "time": time.time()}

    def enrol(self, address: str, body: bytes) -> dict[str, Any]:
        """{token, name, public_key, proof} -> {name, fleet, status}. Raises RefusedError, FleetRefused 400, 409, 429."""
        self._admit(address)
        table = _table(body, "token", "name", "public_key", "proof")
        pem = self._key(table["public_key"])
        verify_statement(pem, table["proof"], ENROL, table["token"].encode(), table["name"].encode(), pem)
        device = self._taken(lambda: self._registry.enrol(table["token"], table["name"], pem))
        return {"name": device.name, "fleet": self._fleet, "status": device.status, "time": time.time()}

    def rotate(self, caller: Caller, body: bytes) -> dict[str, Any]:
        """{public_key, proof by the new key, consent by the old one} -> {name, fingerprint}."""
        table = _table(body, "public_key", "proof", "consent")
        old, new = caller.device.public_key_pem, self._key(table["public_key"])
        verify_statement(new, table["proof"], ROTATE, old, new)
        verify_statement(old, table["consent"], ROTATE, old, new)
        device = self._taken(lambda: self._registry.rotate(caller.device.name, old, new))
        return {"name": device.name, "fingerprint": device.fingerprint}

    def _admit(self, address: str) -> None:
        if not self._each.allow(address) or not self._all.allow(""):
            raise FleetRefused(429, "too many requests from this address: try again in a minute")

    def _taken(self, change: Callable[[], Device]) -> Device:
        try:
            device = change()
        except InputError as error:
            raise FleetRefused(409, str(error).replace("\n  remedy: ", "; ")) from None
        self._changed(device)
        return device

    @staticmethod
    def _key(text: str) -> bytes:
        try:
            return canonical_public_pem(text.encode(), origin="public_key")
        except FieldfleetError as error:
            raise FleetRefused(400, error.message) from None


def _table(body: bytes, *fields: str) -> Mapping[str, str]:
    try:
        table = json.loads(body)
        values = {field: table[field] for field in fields}
        if not all(isinstance(v, str) and len(v) <= FIELD_LIMIT for v in values.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FleetRefused(400, f"not a JSON object with the texts {', '.join(fields)}") from None
    return values
