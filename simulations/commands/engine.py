"""How the clients' local updates are computed."""

from __future__ import annotations

import argparse
from typing import Any

from simulations.engine.names import AUTO, ENGINES


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--workers",
        type=count,
        default=0,
        metavar="N",
        help="processes that train, one thread each (default: one a core)",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default=AUTO,
        help="how local updates are done (default: the fastest, measured once)",
    )
    group.add_argument(
        "--cluster",
        default="",
        metavar="ADDRESS",
        help="train on a Ray cluster: auto, ray://HOST:PORT, HOST:PORT, or local:N for one of N CPUs here",
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``simulate``."""
    return {"workers": args.workers, "engine": args.engine, "cluster": args.cluster}


def count(text: str) -> int:
    found = int(text)
    if not 0 <= found <= 4096:
        raise ValueError
    return found
