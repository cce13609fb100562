"""Child processes of the demo: real commands with a log file each, ended in reverse order whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fl_core.contracts.errors import EnvironmentFault, ExitCode

STOP_SECONDS = 15.0
TAIL_LINES = 12


def free_ports(count: int) -> list[int]:
    """Different ports that are free on loopback now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Children:
    """``with Children(logs) as children``: long-running commands by name; all are stopped when the block ends."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self._running = logs, dict[str, subprocess.Popen[bytes]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """A ``fieldfleet`` command in the background; its output goes to ``logs/NAME.log``."""
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command_line(arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )
        self._running[name] = process
        return process

    def check(self) -> None:
        """Raises EnvironmentFault with the end of its log when a command that should go on has ended."""
        for name, process in self._running.items():
            code = process.poll()
            if code is not None:
                raise EnvironmentFault(
                    f"{name} ended with code {code}\n{self.tail(name)}", remedy=f"see {self.logs / name}.log"
                )

    def tail(self, name: str) -> str:
        text = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in text[-TAIL_LINES:])

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first true value of ``condition``; raises EnvironmentFault at the time limit or when a child ends."""
        deadline = time.monotonic() + seconds
        while True:
            found = condition()
            if found:
                return found
            self.check()
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"{what} did not happen within {seconds:.0f} s", remedy=f"see the logs in {self.logs}"
                )
            time.sleep(0.1)

    def run(self, name: str, arguments: Sequence[str], *, watch: Callable[[], None] | None = None) -> dict[str, Any]:
        """A ``fieldfleet`` command to its end, with ``--json``; returns its document. ``watch`` is called as it runs."""
        out_path = self.logs / f"{name}.json"
        with out_path.open("wb") as out, (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command_line([*arguments, "--json"]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=environment(),
            )
            try:
                while process.poll() is None:
                    if watch:
                        watch()
                    self.check()
                    time.sleep(0.1)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode != ExitCode.DONE:
            raise EnvironmentFault(
                f"fieldfleet {arguments[0]} ended with code {process.returncode}\n{self.tail(name)}",
                remedy=f"see {self.logs / name}.log",
            )
        text = out_path.read_text(encoding="utf-8")
        document: dict[str, Any] = json.loads(text) if text.strip() else {}
        return document


def command_line(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "fieldfleet", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
