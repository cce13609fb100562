"""Flower's time on the server: the wall clock as it was at the start, going on with the monotonic one.

Flower stamps messages and sessions with the wall clock and compares with it when they end. Were that clock set while a
round is under way, every instruction would expire, or every session.
"""

from __future__ import annotations

import datetime
import importlib
import time

# Where flwr has bound the name ``now`` that what its SuperLink stores is stamped and judged by.
PLACES = (
    "flwr.server.superlink.linkstate.sql_linkstate",
    "flwr.server.superlink.linkstate.utils",
    "flwr.server.utils.validator",
)
_offset = time.time() - time.monotonic()


def seconds() -> float:
    """Since 1970, by this process's reckoning."""
    return _offset + time.monotonic()


def now() -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds(), datetime.UTC)


def install() -> None:
    """For the rest of this process; once is enough."""
    for place in PLACES:
        module = importlib.import_module(place)
        assert callable(vars(module)["now"])
        setattr(module, "now", now)  # noqa: B010 mypy: not exported
