"""The face: composes each room's commands; owns demo, evaluate, doctor, apps, and the Python interface.

``from fieldfleet import Federation`` federates an own torch model over own data; see ``docs/simulation.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldfleet.federation import Federation, Result
    from fl_core.algorithms import register_algorithm

__all__ = ["Federation", "Result", "register_algorithm"]


def __getattr__(name: str) -> Any:
    """Imported on first use: a device's agent passes through this package and has no torch."""
    if name in ("Federation", "Result"):
        from fieldfleet import federation

        return getattr(federation, name)
    if name == "register_algorithm":
        from fl_core.algorithms import register_algorithm

        return register_algorithm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
