"""``fieldfleet slurm``: a batch script that trains one application under Slurm, one task a process.

The script is plain enough to be read and changed. A test runs it under the distribution's Slurm on one machine; several nodes: untested.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import ExitCode, InputError
from fl_core.learning.sources import data_option

TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}(:\d{2})?")
SIGNAL_SECONDS = 120
PORT_BASE, PORT_RANGE = 20_000, 20_000


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "slurm", run_slurm, help="write a ready sbatch script for pretrain")
    parser.add_argument("application", metavar="APP")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help="processes of a node (one a GPU)")
    parser.add_argument("--cpus-per-task", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N")
    parser.add_argument("--time", default="01:00:00", metavar="[D-]HH:MM[:SS]")
    parser.add_argument("--partition", default="", metavar="NAME")
    parser.add_argument("--account", default="", metavar="NAME")
    parser.add_argument("--environment", default="", metavar="DIR", help="virtual environment to activate")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder, on a file system that all nodes share")
    parser.add_argument("--script", type=Path, required=True, metavar="FILE", help="where the script goes")
    data_option(parser)


def run_slurm(args: argparse.Namespace) -> int:
    from fl_core.learning.application import application
    from fl_core.storage import atomic

    app = application(args.application)
    app.configure(args.overrides, preset=args.preset)  # refused here, not after hours in a queue
    text = script(args)
    if args.script.exists():
        raise InputError(f"--script {args.script}: exists", remedy="name a new file, or remove this one")
    atomic.write_bytes(args.script, text.encode(), mode=0o755)
    tasks = args.nodes * args.tasks_per_node
    emit(
        args,
        {"script": str(args.script), "processes": tasks},
        f"{args.script}: {tasks} processes of {app.name}; submit it with: sbatch {shlex.quote(str(args.script))}",
    )
    return ExitCode.DONE


def script(args: argparse.Namespace) -> str:
    for name in ("nodes", "tasks_per_node", "cpus_per_task"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least one is needed")
    if not TIME.fullmatch(args.time):
        raise InputError(f"--time {args.time}: write [D-]HH:MM or [D-]HH:MM:SS")
    for name in ("partition", "account"):
        if getattr(args, name) and not re.fullmatch(r"[\w.,-]+", getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name)!r}: not a name")
    options = {
        "job-name": f"fieldfleet-{args.application}",
        "nodes": args.nodes,
        "ntasks-per-node": args.tasks_per_node,
        "cpus-per-task": args.cpus_per_task,
        "gpus-per-node": args.gpus_per_node or None,
        "time": args.time,
        "partition": args.partition or None,
        "account": args.account or None,
        "signal": f"TERM@{SIGNAL_SECONDS}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{k}={v}" for k, v in options.items() if v is not None]
    train = ["fieldfleet", "pretrain", args.application, "--out", args.out, "--seed", str(args.seed)]
    train += ["--preset", args.preset]
    train += ["--data", args.data] if args.data else []
    train += [part for o in args.overrides for part in ("--set", o)]
    activate = [f". {shlex.quote(args.environment.rstrip('/') + '/bin/activate')}"] if args.environment else []
    body = [
        "set -euo pipefail",
        *activate,
        "# the ranks meet on the first node; the port follows the job, so that two jobs of one node do not collide",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        f"MASTER_PORT=$(({PORT_BASE} + SLURM_JOB_ID % {PORT_RANGE}))",
        "OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        "export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS",
        "# an interrupted run is taken up where its last checkpoint is: submit the same script again",
        f"srun --kill-on-bad-exit=1 --cpu-bind=cores {shlex.join(train)}",
    ]
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", *body]) + "\n"
