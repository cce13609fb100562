"""Directory: registry and SuperLink together. Which key is which device is which Flower node."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fl_core.contracts.errors import RefusedError
from fl_core.flower.adapter import LinkStore
from fl_core.identity.signature import Verifier
from fl_server.registry import Device, Registry


@dataclass(frozen=True)
class Caller:
    """An authenticated device."""

    device: Device
    node: int


class _Roll:
    """The registry as it stood at one moment."""

    def __init__(self, devices: list[Device]) -> None:
        self.by_key = {device.public_key_pem: device for device in devices}
        self.by_name = {device.name: device for device in devices}

    @cached_property
    def active(self) -> list[Device]:
        return [device for device in self.by_name.values() if device.active]


class Directory:
    """Devices registered while the server runs are enrolled at their first call."""

    def __init__(self, registry: Registry, store: LinkStore) -> None:
        self._registry, self._store, self._verifier = registry, store, Verifier()
        self._nodes: dict[bytes, int] = {}
        self._seen: dict[str, float] = {}  # contacts that the registry has not been told of yet
        self._lock = threading.Lock()
        self._read = (registry.stamp(), _Roll(registry.devices()))
        self._nodes.update(store.enrol_all(list(self._read[1].by_key)))
        self._names: tuple[_Roll, dict[int, str]] | None = None

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Raises RefusedError: a wrong signature or clock, an unknown key, a revoked device."""
        return self.caller(self._verifier.verify(headers))

    def caller(self, pem: bytes) -> Caller:
        """Whose key this is, after it was proved. Raises RefusedError: an unknown key, a revoked device."""
        device = self._current().by_key.get(pem)
        if device is None:
            if (name := self._registry.former_owner(pem)) is not None:
                raise RefusedError(f"this key of device {name!r} was replaced by a newer one")
            raise RefusedError("this device's key is not registered")
        device.check_active()
        self._seen[device.name] = time.time()
        return Caller(device, self.node(device))

    def node(self, device: Device) -> int:
        with self._lock:
            if device.public_key_pem not in self._nodes:
                self._nodes[device.public_key_pem] = self._store.enrol(device.public_key_pem)
            return self._nodes[device.public_key_pem]

    def names(self) -> dict[int, str]:
        """node id -> device name, of every device that may take part. Not to be changed."""
        roll = self._current()
        if self._names is None or self._names[0] is not roll:
            self._names = (roll, {self.node(device): device.name for device in roll.active})
        return self._names[1]

    def registered(self, name: str) -> bool:
        """Whether a device of this name may take part."""
        device = self._current().by_name.get(name)
        return device is not None and device.active

    def _current(self) -> _Roll:
        """Read again only when the registry changed: it is asked at each request, and holds the whole fleet."""
        stamp = self._registry.stamp()  # before reading: what changes meanwhile is seen next time
        read = self._read
        if read[0] != stamp:
            self._read = read = (stamp, _Roll(self._registry.devices()))
        return read[1]

    def flush_seen(self) -> None:
        """Tell the registry who was heard from: in one write, whatever the size of the fleet."""
        seen, self._seen = self._seen, {}
        if seen:
            self._registry.note_seen(seen)

    def shut_out(self) -> dict[int, str]:
        """node id -> device name ("" for a key that was replaced), of nodes that were let in once and are not now."""
        by_key = {device.public_key_pem: device for device in self._registry.devices()}
        with self._lock:
            nodes = dict(self._nodes)
        found = {node: by_key.get(pem) for pem, node in nodes.items()}
        return {node: d.name if d else "" for node, d in found.items() if d is None or not d.active}
