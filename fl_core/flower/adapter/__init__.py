"""Every private name of flwr 1.41 that this project uses, and nothing else. Its contract test fails when one moves.

``messages`` serves every process that handles messages. ``LinkStore`` is the SuperLink's state behind one lock; its
imports (50 MB) are made only when a server opens one. The messages of the wire are in ``fl_core.flower.wire``.
"""

from fl_core.contracts.offswitches import set_off_switches

set_off_switches()

from fl_core.flower.adapter.exchanges import Exchange, Partial, without  # noqa: E402 after the switches
from fl_core.flower.adapter.fleet_api import FleetAnswer  # noqa: E402 after the switches
from fl_core.flower.adapter.link_store import LinkStore  # noqa: E402 after the switches
from fl_core.flower.adapter.messages import (  # noqa: E402
    Run,
    assume_identity,
    deflate,
    empty_run,
    inflate,
    set_message_id,
)

__all__ = [
    "Exchange",
    "FleetAnswer",
    "LinkStore",
    "Partial",
    "Run",
    "assume_identity",
    "deflate",
    "empty_run",
    "inflate",
    "set_message_id",
    "without",
]
