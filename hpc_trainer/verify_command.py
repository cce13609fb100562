"""The ``verify-loss`` command line and its table."""

from __future__ import annotations

import argparse
from typing import Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import ExitCode
from fl_core.contracts.installed import known_applications
from fl_core.contracts.sections import PARALLEL
from fl_core.learning.application import application
from fl_core.learning.sources import data_option

FAULTS = ("local-bn", "rank-mean", "pad-sampler")
ALL = "all"


def add_command(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "verify-loss", run, help="compare training at several numbers of processes with one process"
    )
    parser.add_argument("--app", default=ALL, metavar="NAME", help="application (default: all)")
    parser.add_argument("--procs", default="1,2,4", metavar="N,N", help="numbers of processes (default: 1,2,4)")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--parallel", choices=PARALLEL, help="the same as --set pretrain.parallel=")
    parser.add_argument("--mesh", metavar="DIMENSION=N,...", help="the same as --set pretrain.mesh=")
    parser.add_argument("--break", choices=FAULTS, default="", dest="broken", help="train with this fault on purpose")
    data_option(parser)


def run(args: argparse.Namespace) -> int:
    from hpc_trainer.verify import chosen_worlds, verify

    worlds = chosen_worlds(args.procs)
    names = known_applications() if args.app == ALL else [args.app]
    overrides = [f"pretrain.parallel={args.parallel}"] if args.parallel else []
    overrides += [f"pretrain.mesh={args.mesh}"] if args.mesh else []
    overrides += args.overrides
    found = [
        verify(application(n), overrides, worlds, dtype=args.dtype, broken=args.broken, data=args.data, seed=args.seed)
        for n in names
    ]
    passed = all(f["passed"] for f in found)
    emit(args, {"passed": passed, "applications": found}, lambda: show(found))
    return ExitCode.DONE if passed else ExitCode.GOAL_MISSED


def show(found: list[dict[str, Any]]) -> None:
    for result in found:
        fault = f", broken on purpose: {result['broken']}" if result["broken"] else ""
        print(
            f"{result['application']}: {result['steps']} steps in {result['dtype']}, {result['parallel']}, "
            f"norm {result['norm']}{fault}; largest deviation from one process, relative; tolerance {result['tolerance']:g}"
        )
        for one in result["comparisons"]:
            verdict = "ok" if one["passed"] else "DIFFERS"
            if one["error"]:
                print(f"  {one['processes']} processes  {verdict}: {one['error']}")
                continue
            shown = "  ".join(f"{kind} {value:.1e}" for kind, value in one["deviations"].items())
            print(f"  {one['processes']} processes  {shown}  {verdict}")
            if not one["passed"]:
                kind = max(one["deviations"], key=lambda k: one["deviations"][k])
                print(f"    largest in {kind}: {one['worst'][kind]}")
