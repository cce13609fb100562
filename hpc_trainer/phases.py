"""The stages of a training step, announced to whoever measures them.

``Trainer(phases=...)`` enters ``phases(NAME)`` around each stage; the default measures nothing and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

INPUT, FORWARD, LOSS, BACKWARD, COMMUNICATION, OPTIMIZER, CHECKPOINT = (
    "input",
    "forward",
    "loss",
    "backward",
    "communication",
    "optimizer",
    "checkpoint",
)
NAMES = (INPUT, FORWARD, LOSS, COMMUNICATION, BACKWARD, OPTIMIZER, CHECKPOINT)  # in the order of a step
Phases = Callable[[str], AbstractContextManager[object]]
_NOTHING = nullcontext()


def unobserved(name: str) -> AbstractContextManager[object]:
    return _NOTHING
