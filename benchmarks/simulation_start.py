"""How long a simulation takes to start: ``fieldfleet simulate`` for one round, beside a Flower project on Ray.

    python -m benchmarks simulation_start [--apps toy_regression,driver_conflict] [--repeat 5] [--quick] [--json]

Of a command in a process of its own, with generated data and two workers: seconds until the first round is in its history,
seconds until the process has ended, and processor time of it and its children. Of these, what loading the interpreter and the
libraries takes is printed by itself: the rest is the work. The peer: two clients of a linear model in numpy, one round, in
Flower's own simulation (left out where ray is not installed). Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import EnvironmentFault
from fl_core.contracts.installed import is_installed
from fl_server.history import FILE_NAME

LIMIT = 300
IMPORTS = "import fieldfleet.__main__, simulations.simulate"
POLL_SECONDS = 0.005


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks simulation_start", description=__doc__)
    parser.add_argument("--apps", default="toy_regression,driver_conflict")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one run of one application, no peer")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    names, repeat = (["toy_regression"], 1) if args.quick else (args.apps.split(","), args.repeat)
    systems = {"imports": [], **{name: [] for name in names}}
    if is_installed("ray") and not args.quick:
        systems["Flower on Ray"] = []
    for _ in range(repeat):
        for name, found in systems.items():
            found.append(measured(name))
    table = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in systems.items()}
    if args.json:
        print(json.dumps(table))
        return 0
    for name, row in table.items():
        first = f"first round {row['first_round_s']:5.2f} s, " if "first_round_s" in row else " " * 21
        print(f"{name:18} {first}whole {row['whole_s']:6.2f} s, {row['cpu_s']:6.2f} s of processor time")
    for name in names:
        print(
            f"{name}: first round {table[name]['first_round_s'] - table['imports']['whole_s']:.2f} s after the libraries were there"
        )
    return 0


def measured(name: str) -> dict[str, float]:
    if name == "imports":
        return timed(["-c", IMPORTS])
    if name == "Flower on Ray":
        return timed(["-m", "benchmarks.flower_app", "--ray", "numpy_linear", "2", "1"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["-m", "fieldfleet", "simulate", name, "--rounds", "1", "--workers", "2", "--out", str(out)]
        return timed(command, out / FILE_NAME)


def timed(arguments: Sequence[str], first: Path | None = None) -> dict[str, float]:
    """first: the file that is no longer empty when the first round is over."""
    before, began, seen = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log, env=environment)
        while child.poll() is None:
            if first is not None and not seen and first.is_file() and first.stat().st_size:
                seen = time.monotonic() - began
            if time.monotonic() - began > LIMIT:
                child.kill()
            time.sleep(POLL_SECONDS)
        if child.returncode:
            log.seek(0)
            raise EnvironmentFault(f"{' '.join(arguments)} failed: {log.read().decode(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = {"whole_s": time.monotonic() - began, "cpu_s": cpu}
    return {**found, "first_round_s": seen} if first is not None else found


if __name__ == "__main__":
    sys.exit(main())
