"""Options of the simulated devices: what they report, and how long a round takes them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

PICTURE = "virtual.png"


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
    group.add_argument(
        "--devices",
        default="",
        metavar="FILE",
        help="speeds, links and drop-outs of the devices, on a virtual clock: a TOML file of classes, or 'generated'",
    )
    group.add_argument(
        "--target", type=float, metavar="X", help="value of the application's metric to which the virtual time is told"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``simulate``."""
    return {"device_states": args.device_states, "round_s": args.round_seconds, "devices": args.devices}


def results(args: argparse.Namespace, application: Any, history: Sequence[Any]) -> dict[str, Any]:
    """With --devices: time and traffic, for the JSON document; draws ``virtual.png`` in the run folder."""
    if not args.devices:
        return {}
    from fl_core.storage import atomic
    from simulations.virtual import results as found

    metric = application.primary_metric
    atomic.write_bytes(args.out / PICTURE, found.picture(history, metric, args.target))
    better = application.higher_is_better
    return {"virtual": {**found.summary(history, metric, args.target, higher_is_better=better), "picture": PICTURE}}


def shown(facts: Mapping[str, Any]) -> str:
    """The same in a line; "" without --devices."""
    virtual = facts.get("virtual")
    if not virtual:
        return ""
    text = f"; {virtual['seconds']:.0f} virtual seconds, {virtual['late']} late replies"
    if "target" in virtual:
        reached = virtual["seconds_to_target"]
        when = "never reached" if reached is None else f"reached after {reached:.0f} s"
        text += f", {virtual['target']:g} {when}"
    down, up = virtual["mean_bytes_down"] / 1e6, virtual["mean_bytes_up"] / 1e6
    return f"{text}; a client was sent {down:.3g} MB and sent {up:.3g} MB on average"


def positive(text: str) -> float:
    found = float(text)
    if not 0 < found < math.inf:
        raise ValueError
    return found
