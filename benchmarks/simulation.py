"""Speed of simulated federations beside pfl-research 0.6, Flower 1.41 on Ray and a plain loop.

    python -m benchmarks simulation [--workloads W1,W2,W3,W3g,W4,driver_conflict,plant_disease] [--clients N]
        [--systems ours,pfl,flower,loop] [--repeat 3] [--quick] [--json]

Every system trains the same clients on the same examples in the same order, with two processes of one thread; the systems
take turns, each in fresh processes, and the averaged weights after round 1 are compared with ours in float64. Printed:
client updates a second and a second of processor time (medians over all rounds but the first of each repetition; the second
one bears a busy machine better), ratios, and the share of what two processes reach in pure matrix products (float32, measured in
the same run). The applications have no such share; pfl-research does not take part there. One file per cell under --out: a repeated call
resumes. Peers: ``pip install -c constraints.txt '.[bench]'``; those that are not installed are left out, with a note.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._applications import CLIENTS
from benchmarks._workloads import WORKLOADS
from fieldfleet.processes import free_ports
from fl_core.storage import atomic

RESULTS = Path("runs/benchmarks/simulation")
PACKAGES = {"pfl": "pfl", "flower": "ray"}
TITLES = {"ours": "fieldfleet", "pfl": "pfl-research 0.6", "flower": "Flower 1.41 on Ray", "loop": "plain loop"}
WITHOUT_APPLICATIONS = {"pfl"}  # what computes a loss by client, with weights, and with our augmentation
ROUNDS = {"driver_conflict": 3, "plant_disease": 2, "W1": 3, "W2": 4, "W3": 3, "W3g": 2, "W4": 20}
QUICK = {"driver_conflict": 8, "plant_disease": 4, "W1": 6, "W2": 8, "W3": 40, "W3g": 20, "W4": 200}
SLOW_PEERS = {"flower": 3}  # rounds at most: what one round costs there is known after two
DEVIATION = 2e-3  # of an averaged weight, float32 against float32: ties of ReLU and pooling fall differently


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", default=",".join([*WORKLOADS, *CLIENTS]))
    parser.add_argument("--systems", default="ours,pfl,flower,loop", help="ours/NAME takes one engine: ours/fused")
    parser.add_argument("--clients", type=int, default=0, help="a round, of every workload (0 = each workload's own)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few clients, one repetition, W3 and W4")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results of cells; remove it to measure anew")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    names = ["W3", "W4"] if args.quick else args.workloads.split(",")
    systems = [s for s in args.systems.split(",") if installed(s)]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) if args.quick else args.out
        for name in names:
            clients = args.clients or (QUICK[name] if args.quick else usual_clients(name))
            taken = [s for s in systems if name in WORKLOADS or s not in WITHOUT_APPLICATIONS]
            rows.append(measure(name, clients, taken, 1 if args.quick else args.repeat, out))
            if not args.json:
                show(rows[-1])
    if args.json:
        print(json.dumps(rows))
    return 1 if any(row["deviations"] and max(row["deviations"].values()) > DEVIATION for row in rows) else 0


def usual_clients(name: str) -> int:
    return CLIENTS[name] if name in CLIENTS else WORKLOADS[name].clients


def installed(system: str) -> bool:
    package = PACKAGES.get(system)
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    print(f"{TITLES[system]} is not installed: pip install -c constraints.txt '.[bench]'", file=sys.stderr)
    return False


def measure(name: str, clients: int, systems: Sequence[str], repeat: int, out: Path) -> dict[str, Any]:
    cells: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    bounds = []
    for number in range(repeat):
        for system in systems:
            cells[system].append(
                cell(system, name, clients, out / f"{name}-{clients}-{system.replace('/', '_')}-{number}")
            )
        bounds.append(cells[systems[0]][-1]["bound_flops"])
    rates = {s: statistics.median(clients / t for c in found for t in c["seconds"][1:]) for s, found in cells.items()}
    per_cpu = {s: statistics.median(clients / t for c in found for t in c["cpu_s"][1:]) for s, found in cells.items()}
    bound = statistics.median(bounds) / WORKLOADS[name].flops if name in WORKLOADS else None
    reference = next((c[0]["weights"] for s, c in cells.items() if s.startswith("ours")), None)
    deviations = {
        s: largest_difference(found[0]["weights"], reference) for s, found in cells.items() if reference is not None
    }
    return {
        "workload": name,
        "clients": clients,
        "updates_per_s": rates,
        "updates_per_cpu_s": per_cpu,
        "bound_updates_per_s": bound,
        "deviations": deviations,
        "first_round_s": {s: statistics.median(c["first_round_s"] for c in found) for s, found in cells.items()},
        "process_s": {s: statistics.median(c["start_up_s"] for c in found) for s, found in cells.items()},
        "process_cpu_s": {s: statistics.median(c["start_up_cpu_s"] for c in found) for s, found in cells.items()},
        "engines": {s: found[0].get("engine", "") for s, found in cells.items()},
    }


def cell(system: str, name: str, clients: int, folder: Path) -> dict[str, Any]:
    """Measured, or read where it was measured before."""
    done = folder / "cell.json"
    if not done.is_file():
        print(f"{name}: {system} ...", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            found = run(system, name, clients, Path(temporary))
            atomic.write_bytes(folder / "first.npz", (Path(temporary) / "first.npz").read_bytes())
        atomic.write_json(done, {**found, "bound_flops": product_rate()})
    with np.load(folder / "first.npz") as weights:
        return {**json.loads(done.read_text()), "weights": dict(weights)}


def run(system: str, name: str, clients: int, out: Path) -> dict[str, Any]:
    rounds = min(1 + ROUNDS[name], SLOW_PEERS.get(system, 100))
    command = [sys.executable, "-m", "benchmarks._simulation_peers", system, name, str(clients), str(rounds), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    if system == "pfl":
        addresses = ",".join(f"localhost:{port}" for port in free_ports(2))
        environments = [{**environment, "PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(r)} for r in (0, 1)]
    else:
        environments = [environment]
    with (out / "log").open("wb") as log:
        children = [subprocess.Popen(command, env=e, stdout=log, stderr=log) for e in environments]
        codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"{system} on {name} failed: {(out / 'log').read_text(errors='replace')[-3000:]}")
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def product_rate() -> float:
    """Floating-point operations a second of square float32 products, in two processes at the same time."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        return sum(pool.map(_products, range(2)))


def _products(number: int) -> float:
    import torch

    torch.set_num_threads(1)
    side, rates = 1024, []
    a, b, c = (torch.randn(side, side) for _ in range(3))
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        began = time.monotonic()
        torch.mm(a, b, out=c)
        rates.append(2 * side**3 / (time.monotonic() - began))
    return statistics.median(rates)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float(np.abs(one[k].astype(np.float64) - other[k].astype(np.float64)).max()) for k in other)


def show(row: dict[str, Any]) -> None:
    rates, per_cpu, bound = row["updates_per_s"], row["updates_per_cpu_s"], row["bound_updates_per_s"]
    ours = next((s for s in rates if s.startswith("ours")), "")
    print(f"{row['workload']}, {row['clients']} clients a round, 2 processes: {row['engines'].get(ours, '')}")
    for system, rate in rates.items():
        ratio = " " * 35
        if ours and system != ours:
            ratio = f"ours {rates[ours] / rate:6.2f} x, {per_cpu[ours] / per_cpu[system]:6.2f} x a CPU s"
        share = f"{rate / bound:6.1%} of the bound; " if bound else ""
        print(
            f"  {TITLES.get(system, system):20} {rate:9,.1f} updates/s, {per_cpu[system]:9,.1f} a CPU s; {ratio}  {share}"
            f"first round {row['first_round_s'][system]:5.2f} s, with start-up {row['process_s'][system]:5.2f} s "
            f"({row['process_cpu_s'][system]:.1f} s of processor time); "
            f"weights differ by {row['deviations'].get(system, 0):.0e}"
        )
    print(f"  {'matrix products':20} {bound:9,.1f} updates/s" if bound else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
