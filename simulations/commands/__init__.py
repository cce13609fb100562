"""``fieldfleet simulate``: one module for each group of its options, and one for each thing that it runs."""

from __future__ import annotations

import argparse

from fl_core.contracts.cli import Subparsers, command
from simulations.commands import devices, engine, federation

OPTIONS = (federation, engine, devices)


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "simulate", run_simulate, help="run a federation on this machine")
    for part in OPTIONS:
        part.add_options(parser)


def run_simulate(args: argparse.Namespace) -> int:
    return federation.run(args)
