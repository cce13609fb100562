"""Unmodified Flower projects, from the start of the process to its end: over our Grid, and in Flower's own simulation on Ray.

    python -m benchmarks flower_app [--clients 20] [--rounds 5] [--pairs 3] [--quick] [--json]

Each system runs each project in a process of its own, in turn; printed: median seconds of both, and the median ratio. The
projects are those of ``tests/flower_apps``. Needs the extra ``cluster`` (ray).
"""

from __future__ import annotations

import argparse
import json
import os
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
from simulations.apps.project import read_project
from simulations.engine.processes import usable_cores

APPS = Path(__file__).resolve().parent.parent / "tests" / "flower_apps"
PROJECTS = ("numpy_linear", "torch_digits")
LIMIT = 600


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks flower_app", description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each system")
    parser.add_argument("--quick", action="store_true", help="one pair of one project, 6 clients, 2 rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ray", nargs=3, metavar=("PROJECT", "CLIENTS", "ROUNDS"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.ray:
        flower(args.ray[0], int(args.ray[1]), int(args.ray[2]))
        return 0
    if not is_installed("ray"):
        raise EnvironmentFault("Flower's own simulation needs ray", remedy="pip install 'fieldfleet[cluster]'")
    clients, rounds, pairs = (6, 2, 1) if args.quick else (args.clients, args.rounds, args.pairs)
    result = [measured(name, clients, rounds, pairs) for name in PROJECTS[: 1 if args.quick else None]]
    if args.json:
        print(json.dumps(result))
    else:
        for found in result:
            print(
                f"{found['project']:14} {clients} clients, {rounds} rounds, {pairs} pairs: fieldfleet {found['fieldfleet_s']:.1f} s, "
                f"Flower on Ray {found['flower_s']:.1f} s, ratio {found['ratio']:.1f}"
            )
    return 0


def measured(name: str, clients: int, rounds: int, pairs: int) -> dict[str, Any]:
    ours = ["-m", "fieldfleet", "simulate", "--flower-app", str(APPS / name)]
    ours += ["--num-clients", str(clients), "--rounds", str(rounds)]
    theirs = ["-m", "benchmarks.flower_app", "--ray", name, str(clients), str(rounds)]
    seconds = [(timed(ours), timed(theirs)) for _ in range(pairs)]
    return {
        "project": name,
        "clients": clients,
        "rounds": rounds,
        "fieldfleet_s": statistics.median(a for a, _ in seconds),
        "flower_s": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(b / a for a, b in seconds),
        "pairs": seconds,
    }


def timed(arguments: list[str]) -> float:
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=log,
            stderr=log,
            timeout=LIMIT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            log.seek(0)
            raise EnvironmentFault(f"{arguments[1]} failed: {log.read().decode(errors='replace')[-2000:]}")
    return seconds


def flower(name: str, clients: int, rounds: int) -> None:
    from fl_core.flower.adapter.simulation import simulate_with_ray

    project = read_project(APPS / name, rounds=rounds)
    simulate_with_ray(
        project.folder, project.server, project.client,
        num_clients=clients, run_config=project.run_config, cpus=usable_cores(),
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
