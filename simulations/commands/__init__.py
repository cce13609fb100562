"""``fieldfleet simulate``: one module for each group of its options, and one for each thing that it runs."""

from __future__ import annotations

import argparse

from fl_core.contracts.cli import Subparsers, command
from fl_core.contracts.errors import InputError
from simulations.commands import devices, engine, experiment, federation, flower_app, partition

OPTIONS = (federation, engine, devices, partition, experiment, flower_app)


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "simulate", run_simulate, help="run a federation on this machine")
    for part in OPTIONS:
        part.add_options(parser)


def run_simulate(args: argparse.Namespace) -> int:
    if args.flower_app is not None:
        if args.application is not None:
            raise InputError(f"{args.application} and --flower-app: name one of them")
        return flower_app.run(args)
    if args.replay is not None:
        return experiment.replay(args)
    if args.plot_partition is not None and args.application is not None:
        return partition.plot(args)
    missing = [
        name
        for name, key in (("APP", "application"), ("--rounds", "rounds"), ("--out", "out"))
        if getattr(args, key) is None
    ]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}", remedy="fieldfleet simulate APP --rounds N --out DIR")
    return experiment.run(args) if experiment.asked_for(args) else federation.run(args)
