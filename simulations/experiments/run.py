"""The whole experiment: cells to processes, their events to a progress bar, the finished ones never again."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fl_core.contracts.errors import InputError
from simulations.experiments.plan import MANIFEST, RESULT, Cell, read_cell
from simulations.experiments.trackers import Tracking


@dataclass(frozen=True)
class State:
    """rounds of ``total`` that are done, in all cells; updates a second since this command began; the newest metrics."""

    rounds: int
    total: int
    updates_per_second: float
    metrics: dict[str, float]


@dataclass
class _Process:
    child: subprocess.Popen[bytes]
    cell: Cell | None = None
    rest: bytes = b""

    @property
    def events(self) -> IO[bytes]:
        assert self.child.stdout is not None
        return self.child.stdout

    def read(self) -> list[dict[str, Any]] | None:
        """The events that arrived; None at the end."""
        found = os.read(self.events.fileno(), 1 << 16)
        *lines, self.rest = (self.rest + found).split(b"\n")
        return [json.loads(line) for line in lines] if found else None


def prepare(out: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Write the manifests; the cells that are still to be run. Raises InputError when ``out`` holds another experiment."""
    for cell in cells:
        folder = out / cell.name
        if (folder / MANIFEST).is_file() and not read_cell(folder).same_question(cell):
            raise InputError(
                f"--out {out}: {cell.name} is another simulation there",
                remedy="name a new folder, or repeat the command",
            )
    todo = []
    for cell in cells:
        if not (out / cell.name / MANIFEST).is_file():
            cell.write(out / cell.name)
        if not (out / cell.name / RESULT).is_file():
            todo.append(cell)
    return todo


def run_cells(
    out: Path, cells: Sequence[Cell], tracking: Tracking, *, jobs: int, on_state: Callable[[State], None]
) -> dict[str, str]:
    """Run what is left of them, ``jobs`` at a time; cell name -> why it failed. The others go on."""
    left, failed, began = deque(cells), dict[str, str](), time.monotonic()
    reached, total, updates = dict.fromkeys((c.name for c in cells), 0), sum(c.rounds for c in cells), 0
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as ready:

        def start() -> None:
            process = _Process(_spawn())
            stack.callback(_end, process.child)
            ready.register(process.events, selectors.EVENT_READ, process)
            hand_out(process)

        def hand_out(process: _Process) -> None:
            process.cell = left.popleft() if left else None
            assert process.child.stdin is not None
            if process.cell is None:
                process.child.stdin.close()
                return
            asked = {"folder": str(out / process.cell.name), "tracking": asdict(tracking)}
            with contextlib.suppress(BrokenPipeError):  # it died: its events end
                process.child.stdin.write(json.dumps(asked).encode() + b"\n")
                process.child.stdin.flush()

        for _ in range(min(jobs, len(cells))):
            start()
        while ready.get_map():
            for key, _ in ready.select():
                process: _Process = key.data
                events = process.read()
                if events is None:
                    ready.unregister(process.events)
                    if process.cell is not None:
                        failed[process.cell.name] = f"its process ended with {process.child.wait()}"
                        if left:
                            start()
                    continue
                for event in events:
                    assert process.cell is not None
                    if event["event"] == "round":
                        reached[process.cell.name], updates = event["round"], updates + event["clients"]
                        speed = updates / (time.monotonic() - began)
                        on_state(State(sum(reached.values()), total, speed, event["metrics"]))
                        continue
                    if event["event"] == "failed":
                        failed[process.cell.name] = event["message"]
                    hand_out(process)
    return failed


def _spawn() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simulations.experiments.worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
