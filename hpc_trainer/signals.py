"""SIGTERM (the end of an allocation, a drained node) and SIGUSR1 (Slurm's ``--signal``): a checkpoint, then the end."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType


class StopSignals:
    """``asked()`` once one has come. A second changes nothing: a cluster signals launcher and processes alike."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # not in the main thread: whoever started us deals with signals
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked
