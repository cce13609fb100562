"""A small federation under random faults: what must never happen, how long each recovery takes, what grows.

    python -m benchmarks soak [--minutes 30] [--seed 0] [--json] [--quick]        (--quick: 2 minutes)

Real processes: ``server run`` with its embedded broker and three ``agent run`` with real torch workers (HTTPS; HTTPS
woken over MQTT; MQTT alone), each behind TCP proxies. One fault after the other: kill -9 of server, agent or training
worker, TCP resets, connections that stall, processes stopped and continued. After each the federation must come back to
a round in which every device takes part; how long that took is the recovery time.

Checked all along: no agent ends by itself, rounds advance, memory and descriptors of the server stay within bounds.
Checked at the end, after a SIGTERM to all: every round is there once and its model is, bit for bit, what exactly one
update of each device in its record makes of the model before (the whole run is computed again in one process); every
database passes SQLite's integrity check, the last checkpoint loads, and no process is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._soak_replay import replay
from benchmarks.idle_device import Case, Device, family
from fieldfleet.processes import Children, free_ports
from fl_core.contracts import checkpoint
from fl_core.learning.application import application
from fl_server.history import FILE_NAME

APPLICATION, NUM_ROUNDS = "toy_regression", 1_000_000
SETTINGS = ["algorithm.min_clients=2", "algorithm.deadline_s=20", "algorithm.evaluate_every=0"]
CASES = (
    Case("https", ("--no-infer",), mqtt=False),
    Case("https + mqtt", ("--no-infer",)),
    Case("mqtt alone", ("--no-infer",), https=False),
)
RECOVERY_S, SAMPLE_S = 180.0, 5.0
MAX_SERVER_MB, MAX_SERVER_FILES, MAX_STORE_MB = 700.0, 200, 64.0


class Broken(Exception):
    """Something that must not happen."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    minutes = args.minutes or (2.0 if args.quick else 30.0)
    with tempfile.TemporaryDirectory() as folder:
        result = Soak(Path(folder), args.seed).run(minutes * 60)
    print(json.dumps(result) if args.json else table(result))
    return 0 if not result["wrong"] else 1


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._home, self._out, (self._port, self._mqtt) = folder / "server", folder / "out", free_ports(2)
        self._server: subprocess.Popen[bytes] | None = None
        self._devices: list[Device] = []
        self._history = Tail(self._out / FILE_NAME)
        self._peaks: dict[str, float] = defaultdict(float)
        self._recoveries: dict[str, list[float]] = defaultdict(list)
        self._sampled = 0.0

    def run(self, seconds: float) -> dict[str, Any]:
        wrong: list[str] = []
        began = time.monotonic()
        try:
            self._prepare()
            self._recover("start")
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                self._quiet(self._random.uniform(1.0, 4.0))
                self._fault()
        except Broken as broken:
            wrong.append(str(broken))
        finally:
            ends = self._stop()
        took = time.monotonic() - began
        wrong += ends
        wrong += replay(self._out, self._folder / "model", self._data(), SETTINGS, NUM_ROUNDS)
        wrong += self._unreadable()
        if wrong:
            self._show_logs()
        return {
            "seconds": round(took, 1),
            "rounds": len(self._history.rounds),
            "rounds_not_applied": self._history.not_applied,
            "replies_refused": self._history.refused,
            "faults": {kind: len(found) for kind, found in sorted(self._recoveries.items())},
            "recovery_s": {
                kind: {"median": round(statistics.median(found), 2), "max": round(max(found), 2)}
                for kind, found in sorted(self._recoveries.items())
            },
            "peaks": {name: round(value, 1) for name, value in sorted(self._peaks.items())},
            "wrong": wrong,
        }

    def _prepare(self) -> None:
        app = application(APPLICATION)
        raw = app.generate(app.configure(["data.clients=3"]), 0)
        with Children(self._folder / "logs") as children:
            children.run(
                "init", ["server", "init", str(self._home), "--port", str(self._port), "--mqtt-port", str(self._mqtt)]
            )
            options = ["--data", "generated", "--set", "pretrain.epochs=1"]
            children.run("pretrain", ["pretrain", APPLICATION, "--out", str(self._folder / "model"), *options])
            for index, case in enumerate(CASES):
                device = Device(self._folder, index, case, self._home, self._port, self._mqtt)
                device.data = self._folder / "data" / device.name
                raw.select([raw.client_ids()[index]]).write(device.data)  # type: ignore[attr-defined]
                self._devices.append(device)
                device.enrol(children)
        self._start_server()
        for device in self._devices:
            device.start()

    def _data(self) -> dict[str, Path]:
        return {device.name: device.data for device in self._devices}

    def _start_server(self) -> None:
        command = ["server", "run", APPLICATION, "--home", str(self._home), "--out", str(self._out)]
        command += ["--from", str(self._folder / "model"), "--rounds", str(NUM_ROUNDS), "--wait", "600"]
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        with (self._folder / "logs" / "server.log").open("ab") as log:
            self._server = subprocess.Popen([sys.executable, "-m", "fieldfleet", *command], stdout=log, stderr=log)

    # faults

    def _fault(self) -> None:
        device = self._random.choice(self._devices)
        kinds: dict[str, Callable[[Device], None]] = {
            "kill -9 of the server": self._kill_server,
            "kill -9 of an agent": self._kill_agent,
            "kill -9 of a worker": self._kill_worker,
            "TCP resets of a device": lambda found: found.each_proxy(lambda proxy: proxy.reset()),
            "stalled connections of a device": self._stall,
            "an agent stopped and continued": lambda found: self._freeze(found.pid),
            "the server stopped and continued": lambda found: self._freeze(self._server_pid),
        }
        kind = self._random.choice(sorted(kinds))
        kinds[kind](device)
        self._recover(kind)

    def _kill_server(self, device: Device) -> None:
        assert self._server is not None
        self._server.kill()
        self._server.wait()
        time.sleep(self._random.uniform(0.0, 3.0))
        self._start_server()

    def _kill_agent(self, device: Device) -> None:
        workers = family([device.pid])[1:]
        device.kill()
        time.sleep(self._random.uniform(0.0, 3.0))
        self._gone(workers)
        device.start()

    def _kill_worker(self, device: Device) -> None:
        for pid in family([device.pid])[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _stall(self, device: Device) -> None:
        device.each_proxy(lambda proxy: proxy.stall(True))
        time.sleep(self._random.uniform(1.0, 8.0))
        device.each_proxy(lambda proxy: proxy.stall(False))

    def _freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(1.0, 8.0))
        os.kill(pid, signal.SIGCONT)

    # checks

    @property
    def _server_pid(self) -> int:
        assert self._server is not None
        return self._server.pid

    def _recover(self, kind: str) -> None:
        """Until a round that began after the fault has a reply of every device."""
        began, names = time.monotonic(), set(self._data())
        self._history.read()
        seen = self._history.last + 1  # the round under way may be whole already
        while not (self._history.last > seen and self._history.clients >= names):
            self._look()
            if time.monotonic() - began > RECOVERY_S:
                raise Broken(f"after {kind}: no round with every device within {RECOVERY_S:.0f} s")
            time.sleep(0.05)
            self._history.read()
        self._recoveries[kind].append(time.monotonic() - began)

    def _quiet(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._look()
            time.sleep(0.1)
        self._history.read()

    def _look(self) -> None:
        if self._server is not None and self._server.poll() is not None:
            raise Broken(f"the server ended with code {self._server.returncode}")
        for device in self._devices:
            if device.ended is not None:
                raise Broken(f"{device.case.name}: the agent ended with code {device.ended}")
        if time.monotonic() - self._sampled > SAMPLE_S:
            self._sampled = time.monotonic()
            self._sample()

    def _sample(self) -> None:
        with contextlib.suppress(OSError, StopIteration):  # it may be killed at any moment, by us
            folder = Path(f"/proc/{self._server_pid}")
            lines = (folder / "status").read_text().splitlines()
            self._note(
                "server_mb", int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) / 1024, MAX_SERVER_MB
            )
            self._note("server_files", len(list((folder / "fd").iterdir())), MAX_SERVER_FILES)
        stores = [path.stat().st_size for path in self._home.glob("*.db*") if path.exists()]
        self._note("server_stores_mb", sum(stores) / 2**20, MAX_STORE_MB)
        for device in self._devices:
            with contextlib.suppress(OSError):
                self._note("agent_files", len(list(Path(f"/proc/{device.pid}/fd").iterdir())), MAX_SERVER_FILES)

    def _note(self, name: str, value: float, limit: float) -> None:
        self._peaks[name] = max(self._peaks[name], value)
        if value > limit:
            raise Broken(f"{name}: {value:.0f} is over {limit:.0f}")

    def _gone(self, pids: list[int]) -> None:
        """The children of a killed agent end by themselves."""
        deadline = time.monotonic() + 30
        while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            if time.monotonic() > deadline:
                raise Broken(f"{len(left)} processes outlived their killed agent")
            time.sleep(0.05)

    def _stop(self) -> list[str]:
        wrong = []
        below = [pid for device in self._devices if device.ended is None for pid in family([device.pid])[1:]]
        for device in self._devices:
            device.stop()
            if device.ended not in (None, 0):
                wrong.append(f"{device.case.name}: the agent ended with code {device.ended}")
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            try:
                self._server.wait(60)
            except subprocess.TimeoutExpired:
                wrong.append("the server did not end within 60 s of SIGTERM")
                self._server.kill()
                self._server.wait()
        try:
            self._gone(below)
        except Broken as broken:
            wrong.append(str(broken))
        self._history.read()
        return wrong

    def _unreadable(self) -> list[str]:
        wrong = []
        for file in sorted(self._folder.rglob("*.db")):
            with contextlib.closing(sqlite3.connect(file)) as database:
                found = database.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                wrong.append(f"{file.relative_to(self._folder)}: {found}")
        if checkpoint.load(self._out / checkpoint.LATEST).manifest.step not in self._history.rounds:
            wrong.append("the last checkpoint is of no round in the history")
        return wrong

    def _show_logs(self) -> None:
        for file in sorted((self._folder / "logs").glob("*.log")):
            lines = file.read_text(errors="replace").splitlines()[-15:]
            print(f"== {file.name}", *lines, sep="\n", file=sys.stderr)


class Tail:
    """The history of a run as it is written."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, 0
        self.rounds: set[int] = set()
        self.last = self.not_applied = self.refused = 0
        self.clients: set[str] = set()

    def read(self) -> None:
        if not self._file.exists():
            return
        with self._file.open("rb") as handle:
            if handle.seek(0, os.SEEK_END) < self._offset:  # the torn end of a killed server was cut off
                self._offset = 0
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            with contextlib.suppress(ValueError):
                self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if entry["round"] not in self.rounds:
            self.not_applied += not entry["applied"]
            self.refused += len(entry["refused"])
        self.rounds.add(entry["round"])
        self.last, self.clients = entry["round"], set(entry["clients"])


def table(result: dict[str, Any]) -> str:
    lines = [f"{key:24} {result[key]}" for key in ("seconds", "rounds", "rounds_not_applied", "replies_refused")]
    lines += [f"{name:24} {value}" for name, value in result["peaks"].items()]
    lines.append(f"{'fault':36} {'times':>6} {'median s':>9} {'max s':>7}")
    for kind, found in result["recovery_s"].items():
        lines.append(f"{kind:36} {result['faults'][kind]:6} {found['median']:9.2f} {found['max']:7.2f}")
    lines += [f"WRONG: {text}" for text in result["wrong"]] or ["nothing that must not happen has happened"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
