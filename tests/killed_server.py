"""``fieldfleet`` with a SIGKILL of its own process at a point of the second round: POINT ARGUMENTS...

The points lie around the real calls of the engine; nothing in the product knows of them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from fieldfleet.__main__ import main
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.storage import atomic
from fl_server import exchange as exchanges
from fl_server.engine import RoundEngine
from fl_server.exchange import Talk
from fl_server.history import History
from fl_server.link_grid import LinkGrid
from fl_server.tally import Tally

ROUND = 2
REACHED = {"round": 0}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(
    place: Any, name: str, *, before: bool = False, at: int = 1, when: Callable[..., bool] | None = None
) -> None:
    """Die at the ``at``-th call of ``place.name`` in the second round for which ``when`` holds."""
    real, count = getattr(place, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        counts = REACHED["round"] == ROUND and (when is None or when(*args))
        count[0] += counts
        if counts and before and count[0] == at:
            die()
        result = real(*args, **options)
        if counts and not before and count[0] == at:
            die()
        return result

    setattr(place, name, call)


def training(talk: Talk, *_: Any) -> bool:
    return talk.plan.kind == "train"


POINTS: dict[str, Callable[[], None]] = {
    "before the round": lambda: around(RoundEngine, "_chosen", before=True),
    "instructions sent": lambda: around(LinkGrid, "send"),
    "first reply stored": lambda: around(Tally, "look", before=True),
    "first reply counted": lambda: around(Tally, "look"),
    "partial sums saved": lambda: around(Talk, "_save_partial"),
    "second reply counted": lambda: around(Tally, "look", at=2),
    "training closed": lambda: around(Talk, "_close", when=training),
    "evaluation sent": lambda: around(LinkGrid, "send", at=2),
    "evaluation closed": lambda: around(Talk, "_close", when=lambda talk: not training(talk)),
    "history written": lambda: around(History, "append"),
    "model half saved": lambda: around(atomic, "exchange", before=True) or around(os, "replace", before=True),
    "model saved": lambda: around(Checkpoint, "save"),
    "link set": lambda: around(atomic, "point_to"),
    "round ended": lambda: around(LinkGrid, "end_rounds", when=lambda grid, through, *_: through == ROUND),
}


def note_rounds() -> None:
    real = RoundEngine._round

    def entered(self: RoundEngine, number: int) -> None:
        REACHED["round"] = number
        real(self, number)

    RoundEngine._round = entered  # type: ignore[method-assign]


if __name__ == "__main__":
    point, *arguments = sys.argv[1:]
    note_rounds()
    if point != "none":
        POINTS[point]()
    exchanges.PARTIAL_BYTES = 1  # partial sums after each reply, so that resuming from them is exercised
    sys.exit(main(arguments))
