"""The fault matrix: what each test in ``tests/faults`` did, what it checked and how long the recovery took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTHS = (22, 40, 66)


@dataclass
class Row:
    """seconds: from the end of the fault (for a kill: from the kill) until everything was right again; None = no outage."""

    fault: str
    phase: str
    checked: str = ""
    outcome: str = ""
    seconds: float | None = None
    test: str = ""


class Fault:
    """What a test tells of itself: ``fault`` and ``phase`` first, then ``recovery()`` around what must happen again."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def about(self, fault: str, phase: str, checked: str) -> None:
        self.row.fault, self.row.phase, self.row.checked = fault, phase, checked

    @contextmanager
    def recovery(self) -> Iterator[None]:
        """Several of them in one test: the longest counts."""
        began = time.monotonic()
        yield
        self.row.seconds = max(self.row.seconds or 0.0, time.monotonic() - began)


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def lines(rows: Sequence[Row]) -> list[str]:
    """One line a row; text that is too wide is cut, the JSON file has it whole."""
    head = ["  ".join([*(_cut(t, w) for t, w in zip(("fault", "phase", "checked"), WIDTHS)), "recovery s", "outcome"])]
    for row in rows:
        words = [_cut(text, width) for text, width in zip((row.fault, row.phase, row.checked), WIDTHS)]
        seconds = f"{row.seconds:10.2f}" if row.seconds is not None else f"{'-':>10}"
        head.append("  ".join([*words, seconds, row.outcome]))
    return head


def _cut(text: str, width: int) -> str:
    return text[:width].ljust(width)
