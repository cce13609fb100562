"""Options of the simulated devices: what they report, and how long a round takes them."""

from __future__ import annotations

import argparse
import math
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--device-states",
        default="",
        metavar="FILE",
        help="what devices report over time, for [selection]: a trace (JSON lines, .csv) or 'generated'",
    )
    group.add_argument(
        "--round-seconds", type=positive, default=3600.0, metavar="S", help="time that a round takes in device states"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``simulate``."""
    return {"device_states": args.device_states, "round_s": args.round_seconds}


def positive(text: str) -> float:
    found = float(text)
    if not 0 < found < math.inf:
        raise ValueError
    return found
