"""Memory of a simulation by the size of its population: 1,000 clients a round, of 100, 10,000 and 1,000,000.

    python -m benchmarks simulation_memory [--clients 100,10000,1000000] [--rounds 10] [--quick] [--json] [--out PNG]

Each number runs in a process of its own with two workers; clients' examples are made when they are asked for. Printed: the
largest resident memory of the driver and of a worker (which shares pages with it), seconds a round; a PNG with one line each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURE = Path("runs/benchmarks/simulation_memory.png")
ASKED = 1_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks simulation_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", default="100,10000,1000000")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two rounds of 100 and 100,000 clients")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    counts = [100, 100_000] if args.quick else [int(n) for n in args.clients.split(",")]
    rows = [measured(count, 2 if args.quick else args.rounds) for count in counts]
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(
                f"{row['clients']:9,} clients, {row['asked']} a round: driver {row['driver_mb']:.0f} MB, worker "
                f"{row['worker_mb']:.0f} MB; {row['round_s']:.2f} s a round, first {row['first_round_s']:.1f} s"
            )
    draw(rows, args.out)
    return 0


def measured(clients: int, rounds: int) -> dict[str, Any]:
    code = f"from benchmarks.simulation_memory import one; one({clients}, {rounds})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(clients: int, rounds: int) -> None:
    """One simulation in this process; prints its figures as JSON."""
    from dataclasses import replace

    import numpy as np

    from benchmarks import _workloads as workloads
    from fl_core.learning.examples import Examples
    from simulations.engine.population import GeneratedPopulation
    from simulations.simulate import simulate

    w = workloads.WORKLOADS["W4"]

    def make(index: int) -> Examples:
        rng = np.random.default_rng(index)
        x = rng.standard_normal((w.examples, *w.shape), dtype=np.float32)
        ids = np.arange(w.examples).astype(np.str_)
        columns = {"client": np.full(w.examples, str(index)), "group": ids, "example_id": ids}
        return Examples({"x": x}, rng.integers(0, w.classes, w.examples), columns)

    config = workloads.configured("W4", clients)
    asked = min(ASKED, clients)
    config = replace(config, algorithm=replace(config.algorithm, clients_per_round=asked))
    ends = [time.monotonic()]
    with tempfile.TemporaryDirectory() as temporary:
        simulate(
            workloads.APPLICATION, config, GeneratedPopulation(clients, make, size=w.examples), start=None,
            num_rounds=rounds, seed=0, out=Path(temporary) / "run", workers=2, engine="stacked:64",
            on_round=lambda record: ends.append(time.monotonic()),
        )  # fmt: skip
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {
                "clients": clients,
                "asked": asked,
                "rounds": rounds,
                "driver_mb": own,
                "worker_mb": child,
                "first_round_s": ends[1] - ends[0],
                "round_s": (ends[-1] - ends[1]) / max(1, rounds - 1),
            }
        )
    )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    from fl_core.report.charts import lines
    from fl_core.storage import atomic

    x = [len(str(row["clients"])) - 1 for row in rows]
    series = {name: (x, [row[key] for row in rows]) for name, key in (("driver", "driver_mb"), ("worker", "worker_mb"))}
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = lines(series, x_label="clients of the population, as a power of 10", y_label="peak resident memory, MB")
    atomic.write_bytes(file, picture)
    print(f"picture: {file}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
