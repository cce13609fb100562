"""A process that runs one cell after the other: folders in on stdin, events out as JSON lines on its first stdout."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is not an event
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing goes on without the command
    from fl_core.contracts.errors import FieldfleetError
    from fl_core.contracts.offswitches import set_off_switches

    set_off_switches()
    from fl_server.history import RoundRecord
    from simulations.experiments.cell import run_cell
    from simulations.experiments.trackers import Tracking

    def say(kind: str, **facts: Any) -> None:
        print(json.dumps({"event": kind, **facts}), file=events)

    for line in sys.stdin:
        asked = json.loads(line)
        folder, tracking = Path(asked["folder"]), Tracking(**asked["tracking"])

        def on_round(record: RoundRecord) -> None:
            metrics = record.held_out or record.evaluation
            say("round", round=record.round, clients=len(record.clients), metrics=metrics, loss=record.loss)

        try:
            run_cell(folder, tracking, on_round=on_round)
            say("done")
        except FieldfleetError as error:
            say("failed", message=error.message, remedy=error.remedy, code=int(error.exit_code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
