"""Topics and who may use them: one table for the device, the bridge, the embedded broker and mosquitto's ACL file.

fieldfleet/v1/FLEET/devices/NAME/state       device -> server   retained; birth, changes, death (also the will)
fieldfleet/v1/FLEET/devices/NAME/telemetry   device -> server   counts and quantiles, never raw data
fieldfleet/v1/FLEET/devices/NAME/reply       device -> server   one per job id
fieldfleet/v1/FLEET/devices/NAME/up          device -> server   packets of the tunnel (fl_core/link/tunnel)
fieldfleet/v1/FLEET/devices/NAME/down        server -> device   packets of the tunnel
fieldfleet/v1/FLEET/devices/NAME/desired     server -> device   retained; what the device should be
fieldfleet/v1/FLEET/devices/NAME/command     server -> device   jobs and wake-ups
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fl_core.contracts.names import NAME_PATTERN, checked_name

PREFIX = "fieldfleet/v1"
STATE, TELEMETRY, REPLY, DESIRED, COMMAND = "state", "telemetry", "reply", "desired", "command"
UP, DOWN = "up", "down"
FROM_DEVICE = (STATE, TELEMETRY, REPLY, UP)
TO_DEVICE = (DESIRED, COMMAND, DOWN)
KINDS = (*FROM_DEVICE, *TO_DEVICE)

# A device name starts with a letter or a digit, so that no device can be registered under these.
SERVER_ACCOUNT = "_server"
OPERATOR_ACCOUNT = "_operator"
SERVICE_ACCOUNTS = (SERVER_ACCOUNT, OPERATOR_ACCOUNT)

Action = Literal["publish", "subscribe", "receive"]


@dataclass(frozen=True)
class DeviceTopic:
    """One parsed topic."""

    fleet: str
    device: str
    kind: str


def topic(fleet: str, device: str, kind: str) -> str:
    """Raises InputError for a name that is no topic level, ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of topic {kind!r}")
    return f"{PREFIX}/{checked_name(fleet, 'fleet')}/devices/{checked_name(device, 'device')}/{kind}"


def every_device(fleet: str, kind: str) -> str:
    """The filter that the server and operators subscribe to."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of topic {kind!r}")
    return f"{PREFIX}/{checked_name(fleet, 'fleet')}/devices/+/{kind}"


def parse(name: str) -> DeviceTopic | None:
    """None for a topic that is not one of ours."""
    levels = name.split("/")
    if len(levels) != 6 or "/".join(levels[:2]) != PREFIX or levels[3] != "devices" or levels[5] not in KINDS:
        return None
    if not NAME_PATTERN.fullmatch(levels[2]) or not NAME_PATTERN.fullmatch(levels[4]):
        return None
    return DeviceTopic(levels[2], levels[4], levels[5])


def may(account: str, fleet: str, action: Action, name: str) -> bool:
    """The access rule: a device uses only its own topics, each in its own direction; the server and operators use all.

    ``name`` is a topic, or a filter when ``action`` is "subscribe".
    """
    service = account in SERVICE_ACCOUNTS
    if action == "subscribe" and service:
        return name in {every_device(fleet, kind) for kind in FROM_DEVICE} or _allowed(
            service, account, fleet, False, name
        )
    return _allowed(service, account, fleet, action == "publish", name)


def _allowed(service: bool, account: str, fleet: str, publish: bool, name: str) -> bool:
    found = parse(name)
    if found is None or found.fleet != fleet:
        return False
    if service:
        return found.kind in (TO_DEVICE if publish else FROM_DEVICE)
    return found.device == account and found.kind in (FROM_DEVICE if publish else TO_DEVICE)
