"""``fieldfleet probe``, ``scaling``, ``profile``, ``estimate``: what a machine can do, and what training makes of it."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fl_core.contracts.cli import Subparsers, command, emit, output_folder
from fl_core.contracts.errors import ExitCode, InputError
from fl_core.contracts.sections import PARALLEL
from fl_core.learning.sources import data_option


def add_commands(subparsers: Subparsers) -> None:
    probe = command(
        subparsers, "probe", run_probe, config=False, help="measure memory, matrix products, file system and all-reduce"
    )
    probe.add_argument("--procs", type=int, default=2, metavar="N", help="processes of the all-reduce (default: 2)")
    probe.add_argument(
        "--path", type=Path, default=Path("."), metavar="DIR", help="file system to read (default: here)"
    )
    probe.add_argument("--out", type=Path, metavar="FILE", help="keep the JSON document for scaling and estimate")
    probe.add_argument("--quick", action="store_true", help="small sizes, a few seconds")

    scaling = command(subparsers, "scaling", run_scaling, help="strong and weak scaling of training on this machine")
    scaling.add_argument("--app", required=True, metavar="APP")
    scaling.add_argument("--procs", default="1,2", metavar="1,2,...", help="numbers of processes (default: 1,2)")
    scaling.add_argument("--mode", choices=("strong", "weak", "both"), default="both")
    scaling.add_argument("--steps", type=int, default=30, metavar="N", help="measured steps (default: 30)")
    scaling.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    scaling.add_argument(
        "--probe", type=Path, metavar="FILE", help="of this machine: expected times beside measured ones"
    )
    scaling.add_argument("--out", type=Path, required=True, metavar="DIR", help="report.html, pictures, JSON, traces")
    data_option(scaling)

    profile = command(
        subparsers, "profile", run_profile, help="time and memory of each stage of a step, and their powers"
    )
    profile.add_argument("--app", required=True, metavar="APP")
    profile.add_argument(
        "--scan",
        action="append",
        metavar="KEY=SIZE,SIZE,...",
        help="sizes of one or several keys, KEY+KEY=...; may be repeated (default: edge, channels and batch, four sizes each)",
    )
    profile.add_argument("--procs", type=int, default=1, metavar="N", help="processes (default: 1)")
    profile.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps at each size (default: 5)")
    profile.add_argument("--out", type=Path, required=True, metavar="DIR", help="report.html, pictures, JSON")

    estimate = command(
        subparsers, "estimate", run_estimate, help="memory, operations and messages of a run, unallocated"
    )
    estimate.add_argument("--app", required=True, metavar="APP")
    estimate.add_argument("--world", type=int, default=1, metavar="N", help="processes (default: 1)")
    estimate.add_argument("--parallel", choices=PARALLEL, default="ddp")
    estimate.add_argument("--mesh", metavar="DIMENSION=N,...", default="", help="the same as --set pretrain.mesh=")
    estimate.add_argument(
        "--probe", type=Path, metavar="FILE", help="of a node of the cluster: the least time of a step"
    )


def run_probe(args: argparse.Namespace) -> int:
    from hpc_trainer.performance import probe
    from hpc_trainer.performance.worker import start

    if args.procs < 1:
        raise InputError(f"--procs {args.procs}: at least one process is needed")
    if not args.path.is_dir():
        raise InputError(f"--path {args.path}: no such folder")
    document = probe.measure(args.path, quick=args.quick)
    if args.procs > 1:
        spec = {"work": "all_reduce", "largest": 1 << (20 if args.quick else 28), "seconds": 0.2 if args.quick else 2.0}
        with tempfile.TemporaryDirectory() as folder:
            document["all_reduce"] = start(spec, args.procs, Path(folder))[0]
    if args.out:
        from fl_core.storage import atomic

        atomic.write_json(args.out, document)
    emit(args, document, lambda: print_probe(document))
    return ExitCode.DONE


def read_probe(path: Path) -> dict[str, Any]:
    """A file of ``fieldfleet probe --out``. Raises InputError naming it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--probe {path}: {error}", remedy="make one with 'fieldfleet probe --out FILE'") from None
    if not isinstance(document, dict) or document.get("format") != 1 or "matrix_product" not in document:
        raise InputError(
            f"--probe {path}: not a probe of format 1", remedy="make one with 'fieldfleet probe --out FILE'"
        )
    return document


def run_scaling(args: argparse.Namespace) -> int:
    from hpc_trainer.performance import scaling, scaling_report

    plan = scaling.Plan.of(args)
    output_folder(args.out)
    expected = read_probe(args.probe) if args.probe else None
    document = scaling.measure(plan, args.out, expected)
    scaling_report.write(document, args.out)
    emit(args, document, lambda: scaling_report.show(document, args.out))
    return ExitCode.DONE


def run_profile(args: argparse.Namespace) -> int:
    from hpc_trainer.performance import profile, profile_report

    output_folder(args.out)
    document = profile.measure(args, args.out)
    profile_report.write(document, args.out)
    emit(args, document, lambda: profile_report.show(document, args.out))
    return ExitCode.DONE


def run_estimate(args: argparse.Namespace) -> int:
    from fl_core.learning.application import application
    from hpc_trainer.performance.estimate import estimate

    document = estimate(
        application(args.app),
        args.preset,
        args.overrides,
        world=args.world,
        parallel=args.parallel,
        mesh=args.mesh,
        probe=read_probe(args.probe) if args.probe else None,
    )
    emit(args, document, lambda: print_estimate(document))
    return ExitCode.DONE


def print_estimate(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    batch = document["batch"]
    table = Table(
        title=f"{document['application']}: {document['parameters']:,} parameters, {document['world']} processes "
        f"({document['parallel']}: {', '.join(f'{k}={v}' for k, v in document['mesh'].items()) or 'alone'}), "
        f"batch {batch['global']}, {batch['micro_batches']} x {batch['process']} each"
    )
    table.add_column("each process", overflow="fold")
    table.add_column("", justify="right")
    for name, value in document["memory_bytes"].items():
        table.add_row(f"memory, {name}", f"{value / 1e6:,.1f} MB")
    for name, value in document["flops"].items():
        table.add_row(f"operations, {name}", f"{value / 1e9:,.2f} GFLOP")
    table.add_row("sent in a step", f"{document['message_bytes'] / 1e6:,.1f} MB")
    seconds = document.get("step_seconds_at_least")
    if seconds is not None:
        table.add_row("a step takes at least", f"{1e3 * seconds:,.1f} ms")
    Console().print(table)


def print_probe(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    node, matrix, disk = document["node"], document["matrix_product"], document["file_system"]
    table = Table(title=f"{node['host']}: {node['processor']['model']}", show_lines=False)
    for heading in ("what", "measured", "95 % interval or detail"):
        table.add_column(heading, overflow="fold")
    cores = node["processor"]
    quota = f", quota {cores['quota']:g}" if cores["quota"] else ""
    table.add_row("cores", f"{cores['physical']} physical, {cores['logical']} logical{quota}", _words(cores["caches"]))
    table.add_row("memory", f"{node['memory_bytes'] / 2**30:.1f} GiB", f"{len(node['numa']) or 1} NUMA nodes")
    for entry in node["numa"]:
        table.add_row(f"  NUMA {entry['node']}", f"cpus {entry['cpus']}", f"distances {entry['distances']}")
    for gpu in node["gpus"]:
        table.add_row(f"GPU {gpu['index']}", gpu["name"], f"peers {gpu['peers']}")
    for name in ("copy", "triad"):
        table.add_row(f"memory {name}", *_rate(document["memory"][name], 1e9, "GB/s"))
    for name in ("float32", "bfloat16", "float64"):
        table.add_row(f"matrix product {name}", *_rate(matrix[name], 1e9, "GFLOP/s"))
    for name in ("sequential_cold", "random_cold", "sequential_warm"):
        latency = disk[name].get("latency_seconds")
        detail = (
            f"{1e6 * latency:.0f} us a 4 kB read" if latency else disk["cold_by"] if "cold" in name else "page cache"
        )
        table.add_row(f"read, {name.replace('_', ' ')}", f"{disk[name]['bytes_per_second'] / 1e6:,.1f} MB/s", detail)
    if "all_reduce" in document:
        _all_reduce_rows(table, document["all_reduce"])
    Console().print(table)


def _all_reduce_rows(table: Any, found: dict[str, Any]) -> None:
    for row in found["sizes"]:
        seconds = row["seconds"]
        table.add_row(
            f"all-reduce of {row['bytes'] / 1024:,.0f} kB, {found['processes']} {found['backend']} processes",
            f"{1e3 * seconds['value']:.3f} ms",
            f"{1e3 * seconds['low']:.3f} to {1e3 * seconds['high']:.3f}",
        )
    if "alpha_seconds" in found:
        alpha, beta = found["alpha_seconds"], found["beta_seconds_per_byte"]
        table.add_row(
            "  alpha (latency)",
            f"{1e6 * alpha['value']:.1f} us",
            f"{1e6 * alpha['low']:.1f} to {1e6 * alpha['high']:.1f}",
        )
        table.add_row(
            "  beta (inverse bandwidth)",
            f"{1e9 * beta['value']:.3f} ns a byte",
            f"{1e9 * beta['low']:.3f} to {1e9 * beta['high']:.3f}; bus {found['bus_bytes_per_second'] / 1e9:.2f} GB/s",
        )


def _rate(found: dict[str, float], unit: float, name: str) -> tuple[str, str]:
    return f"{found['value'] / unit:,.1f} {name}", f"{found['low'] / unit:,.1f} to {found['high'] / unit:,.1f}"


def _words(table: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in table.items() if v)
