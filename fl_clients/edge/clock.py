"""A floor under the clock: expiry protects a device only while its clock does not run backwards.

The floor is the latest time at which an update was verified, kept across restarts. A device without a clock of its own
starts in the past after a power cut, and must not then take expired metadata for valid.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from fl_core.contracts.errors import EnvironmentFault
from fl_core.storage import atomic

TOLERANCE = datetime.timedelta(minutes=5)
REMEDY = "set the clock (NTP), then update again"


def parse_time(text: str) -> datetime.datetime | None:
    """RFC 3339; None where it is not, or names no time zone."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


class ClockFloor:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> datetime.datetime | None:
        """None where there is no floor yet, or the file is damaged."""
        try:
            return parse_time(str(json.loads(self.path.read_text(encoding="ascii"))["floor"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check(self, now: datetime.datetime, *, also: datetime.datetime | None = None) -> None:
        """Raises EnvironmentFault when ``now`` is earlier than the floor, or than ``also``, a signed time."""
        for floor, meaning in ((self.read(), "the last verified update"), (also, "the publication of the model")):
            if floor is not None and now < floor - TOLERANCE:
                raise EnvironmentFault(
                    f"the clock says {now.isoformat(timespec='seconds')}, earlier than {meaning} at "
                    f"{floor.isoformat(timespec='seconds')}",
                    remedy=REMEDY,
                )

    def raise_to(self, now: datetime.datetime) -> None:
        """After an update was verified: its metadata expires within a month, so a clock far ahead never gets here."""
        floor = self.read()
        if floor is None or now > floor:
            atomic.write_json(self.path, {"floor": now.isoformat(timespec="seconds")})
