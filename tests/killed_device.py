"""A device process (``tests/link_device.py``) that kills itself with SIGKILL at a point of a round: POINT ROUND ARGUMENTS...

The points lie around the real calls; nothing in the product knows of them. It happens once: ``KILLED`` in the device's
folder says that it did, so that the restarted process lives.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fl_clients.training import bulk
from fl_clients.training.fleet import FleetClient
from fl_clients.training.outbox import Outbox
from fl_clients.training.worker_process import WorkerProcess
from fl_core.storage import atomic
from tests import link_device

AT, COUNT = 0, {"instructions": 0}
MARK = Path()


def die() -> None:
    MARK.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def now() -> bool:
    return COUNT["instructions"] == AT and not MARK.exists()


def around(place: Any, name: str, *, before: bool = False) -> None:
    real = getattr(place, name)

    def call(*args: Any, **options: Any) -> Any:
        if before and now():
            die()
        result = real(*args, **options)
        if not before and now():
            die()
        return result

    setattr(place, name, call)


def half_received() -> None:
    real = bulk._objects

    def objects(records: Iterator[bytes], ids: list[str], url: str) -> dict[str, bytes]:
        if COUNT["instructions"] + 1 == AT and not MARK.exists():
            next(records)
            die()
        return real(records, ids, url)

    bulk._objects = objects


def half_sent() -> None:
    real = bulk.packed

    def packed(parts: list[bytes]) -> Iterable[bytes]:
        for number, part in enumerate(real(parts)):
            if number == 3 and now():
                die()
            yield part

    bulk.packed = packed  # type: ignore[assignment]


POINTS: dict[str, Callable[[], None]] = {
    "instruction half received": half_received,
    "instruction received": lambda: around(FleetClient, "receive"),
    "trained, not kept": lambda: around(WorkerProcess, "run"),
    "reply half kept": lambda: around(atomic.os, "replace", before=True),
    "reply kept, not sent": lambda: around(Outbox, "put"),
    "reply half sent": half_sent,
    "reply sent, not forgotten": lambda: around(FleetClient, "push"),
    "reply forgotten": lambda: around(Outbox, "remove"),
}


def count_instructions() -> None:
    real = FleetClient.receive

    def receive(self: FleetClient, *args: Any, **options: Any) -> Any:
        found = real(self, *args, **options)
        COUNT["instructions"] += found is not None
        return found

    FleetClient.receive = receive  # type: ignore[method-assign]


if __name__ == "__main__":
    point, number, mark, *arguments = sys.argv[1:]
    AT, MARK = int(number), Path(mark)
    count_instructions()
    POINTS[point]()
    sys.argv = [sys.argv[0], *arguments]
    sys.exit(link_device.main())
