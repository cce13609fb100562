"""Directory: registry and SuperLink together. Which key is which device is which Flower node."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from fl_core.contracts.errors import RefusedError
from fl_core.flower.adapter import LinkStore
from fl_core.identity.signature import Verifier
from fl_server.registry import Device, Registry


@dataclass(frozen=True)
class Caller:
    """An authenticated device."""

    device: Device
    node: int


class Directory:
    """Devices registered while the server runs are enrolled at their first call."""

    def __init__(self, registry: Registry, store: LinkStore) -> None:
        self._registry, self._store, self._verifier = registry, store, Verifier()
        self._nodes: dict[bytes, int] = {}
        self._lock = threading.Lock()
        for device in registry.devices():
            self.node(device)

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Raises RefusedError: a wrong signature or clock, an unknown key, a revoked device."""
        return self.caller(self._verifier.verify(headers))

    def caller(self, pem: bytes) -> Caller:
        """Whose key this is, after it was proved. Raises RefusedError: an unknown key, a revoked device."""
        device = self._registry.by_key(pem)
        if device is None:
            raise RefusedError("this device's key is not registered")
        if device.revoked:
            raise RefusedError(f"device {device.name!r} was revoked on {device.revoked_at}")
        return Caller(device, self.node(device))

    def node(self, device: Device) -> int:
        with self._lock:
            if device.public_key_pem not in self._nodes:
                self._nodes[device.public_key_pem] = self._store.enrol(device.public_key_pem)
            return self._nodes[device.public_key_pem]

    def names(self) -> dict[int, str]:
        """node id -> device name, of every registered device that is not revoked."""
        return {self.node(device): device.name for device in self._registry.devices() if not device.revoked}

    def registered(self, name: str) -> bool:
        """Whether a device of this name may take part: it is known and not revoked."""
        device = self._registry.by_name(name)
        return device is not None and not device.revoked
