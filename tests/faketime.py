"""Another clock for a child process, changed while it runs: libfaketime, which Debian has as a package."""

from __future__ import annotations

import os
from pathlib import Path

PLACES = (
    "/usr/lib/*/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
    "/usr/local/lib/faketime/libfaketimeMT.so.1",
)
# libfaketime 0.9.10 breaks clock_nanosleep with an absolute time, which is what time.sleep calls.
SLEEP = "import threading, time\ntime.sleep = lambda seconds: threading.Event().wait(seconds) and None\n"


class Clock:
    """``environment`` is for the child. The wall clock only: timeouts run on the monotonic one, which cannot be set."""

    def __init__(self, file: Path) -> None:
        found = [path for place in PLACES for path in Path("/").glob(place.lstrip("/"))]
        assert found, "this test sets the clock of a process: apt-get install libfaketime"
        self._file = file
        self.set(0)
        site = file.parent / "faketime-site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SLEEP)
        self.environment = {
            "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, seconds: int) -> None:
        """It is that much later (or earlier) than it really is."""
        temporary = self._file.with_suffix(".new")
        temporary.write_text(f"{seconds:+d}\n")
        temporary.replace(self._file)
