"""Notices that ``fieldfleet publish``, another process, has changed the repository: devices are told instead of asking."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fl_server.repository_files import RepositoryFiles

log = logging.getLogger(__name__)
LOOK_S = 1.0  # one stat(2); file systems that notify across machines do not exist


class RepositoryWatch:
    """start() ... stop(). changed(generation) is called on a thread of its own, for each generation after the first."""

    def __init__(self, files: RepositoryFiles, changed: Callable[[int], None]) -> None:
        self._files, self._changed = files, changed
        self._stopping = threading.Event()
        self._last: int | None = None
        self._thread = threading.Thread(target=self._run, name="repository-watch", daemon=True)

    def start(self) -> None:
        self._last = self._files.generation()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            found = self._files.generation()
            if found is None or found == self._last:
                continue
            self._last = found
            try:
                self._changed(found)
            except Exception:  # devices that were not told ask at their next regular check
                log.exception("the repository's generation %d was not announced", found)
