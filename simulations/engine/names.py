"""The names of the ways to do local updates; imports nothing heavy, for the command line."""

from __future__ import annotations

from fl_core.contracts.errors import InputError, unknown_name

AUTO, SEQUENTIAL, STACKED, FUSED, FUNCTIONAL = "auto", "sequential", "stacked", "fused", "functional"
ENGINES = (AUTO, SEQUENTIAL, STACKED, FUSED, FUNCTIONAL)
STACKING = (STACKED, FUNCTIONAL)
DEFAULT_STACK, MAX_STACK = 32, 4096


def parsed(engine: str) -> tuple[str, int]:
    """ "NAME" or "NAME:K" -> (name, K); K = 0 where it is not said. Raises InputError."""
    name, colon, number = engine.partition(":")
    if name not in ENGINES:
        raise unknown_name("engine", name, list(ENGINES))
    if not colon:
        return name, 0
    if name not in STACKING or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= MAX_STACK:
        raise InputError(
            f"--engine {engine}: not usable", remedy=f"stacked:K or functional:K, with K from 1 to {MAX_STACK}"
        )
    return name, int(number)
