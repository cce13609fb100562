"""What the fleet's devices last said of themselves, read from the table of devices for the selection."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_core.contracts.device_state import DeviceState, from_table
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.sections import SelectionConfig
from fl_server.device_table import DeviceTable
from fl_server.registry import Device, Registry
from fl_server.selection import StateSelector

if TYPE_CHECKING:
    from fl_server.superlink import SuperLink

log = logging.getLogger(__name__)
POST_KEYS = ("device", "capabilities")


class DeviceStates:
    """Callable: name -> DeviceState of every registered device; a state that cannot be read is unknown.

    The operator's group and tags (of the registry) come before what a device says of itself.
    """

    def __init__(self, table: DeviceTable, registry: Registry) -> None:
        self._table, self._registry = table, registry
        self._known: dict[str, tuple[str, DeviceState]] = {}  # what was read of whom, and what it became

    def __call__(self) -> Mapping[str, DeviceState]:
        found = {name: self._read(name, text, seen_at) for name, seen_at, text in self._table.said()}
        return {device.name: _placed(device, found.get(device.name)) for device in self._registry.devices()}

    def _read(self, name: str, text: str, seen_at: float) -> DeviceState:
        known = self._known.get(name)
        if known is None or known[0] != text:
            try:
                state = read_state(json.loads(text), seen_at=seen_at, origin=name)
            except IntegrityError as error:
                log.warning("selection: %s", error.message)
                state = DeviceState()
            known = self._known[name] = (text, state)
        return dataclasses.replace(known[1], seen_at=seen_at)


def _placed(device: Device, state: DeviceState | None) -> DeviceState:
    """Where the operator has put it."""
    state = state or DeviceState()
    if device.group or device.tags:
        tags = (*device.tags, *(tag for tag in state.tags or () if tag not in device.tags))
        known = tags if device.tags or state.tags is not None else None
        return dataclasses.replace(state, group=device.group or state.group, tags=known)
    return state


def fleet_selector(config: Any, application: str, superlink: SuperLink, seed: int) -> StateSelector:
    """The selector of a run over a real fleet: [selection] of its configuration, by what devices say now."""
    settings = getattr(config, "selection", None) or SelectionConfig()  # an application without that section
    return StateSelector(
        settings,
        DeviceStates(superlink.devices, superlink.registry),
        seed=seed,
        application=application,
        clock=time.time,
    )


def read_state(body: Mapping[str, Any], *, seen_at: float, origin: str) -> DeviceState:
    """From the body of a birth, a state message or a posted one. Raises IntegrityError naming the key.

    Applications, roles and versions come from the capabilities; the time is the server's own.
    """
    state = from_table(body.get("device", {}), origin=f"{origin}: device")
    told = body.get("capabilities", {})
    if not isinstance(told, Mapping):
        raise IntegrityError(f"{origin}: the capabilities are not a table")
    roles, runtime = told.get("roles", {}), told.get("runtime", {})
    table = {
        "applications": told.get("applications"),
        "trains": roles.get("train") if isinstance(roles, Mapping) else None,
        "version": runtime.get("fieldfleet") if isinstance(runtime, Mapping) else None,
    }
    known = from_table(table, origin=f"{origin}: capabilities")
    values = {name: value for name in table if (value := getattr(known, name)) is not None}
    return dataclasses.replace(state, seen_at=seen_at, **values)


def parse_posted(body: bytes, *, origin: str) -> dict[str, Any]:
    """The body of POST /fieldfleet/v1/state. Raises IntegrityError; keys that are not for here are dropped."""
    try:
        table = json.loads(body)
    except (ValueError, RecursionError):
        raise IntegrityError(f"{origin}: the state is not JSON") from None
    if not isinstance(table, dict):
        raise IntegrityError(f"{origin}: the state is not a table")
    found = {key: table[key] for key in POST_KEYS if key in table}
    read_state(found, seen_at=0.0, origin=origin)
    return found
