"""Progress on stderr, so that stdout holds results only; plain lines where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self


class Progress:
    """A bar with count, time left and a short status. Falls back to a line every two seconds without a terminal.

    total: None where nobody knows it.
    """

    def __init__(self, title: str, total: int | None, *, quiet: bool = False) -> None:
        self.title, self.total, self._quiet = title, total, quiet
        self._bar = None
        self._last, self._began = 0.0, time.monotonic()
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, status="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, status: str = "") -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif done == self.total or time.monotonic() - self._last > 2:
            self._last = time.monotonic()
            of = "" if self.total is None else f"/{self.total}"
            left = (time.monotonic() - self._began) / done * (self.total - done) if self.total and done else 0.0
            status += f", {left:.0f} s left" if left > 1 else ""
            print(f"{self.title} {done}{of} {status.removeprefix(', ')}".rstrip(), file=sys.stderr, flush=True)
