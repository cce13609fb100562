"""``fieldfleet simulate``: one module for each group of its options, and one for each thing that it runs."""

from __future__ import annotations

import argparse

from fl_core.contracts.cli import Subparsers, command, common_options
from fl_core.contracts.errors import InputError
from simulations.commands import devices, engine, experiment, federation, flower_app, partition

OPTIONS = (federation, engine, devices, partition, experiment, flower_app)


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "simulate", run_simulate, help="run a federation on this machine")
    for part in OPTIONS:
        part.add_options(parser)


MANY = ("seeds", "sweep", "parquet", "tensorboard", "mlflow")  # of an experiment
FLOWER = ("num_clients", "run_config", "in_process")
# Options that would do nothing beside another one, or without it: (the other one, whether it is given, those).
BESIDE_FLOWER_APP = ("application", "overrides", "preset", "start", "data", "out", "engine", "cluster", "device_states",
    "round_seconds", "devices", "target", "partition", "population", "plot_partition", *MANY, "jobs", "replay")  # fmt: skip
BESIDE_REPLAY = ("application", "overrides", "preset", "seed", "start", "rounds", "engine", "cluster", "device_states",
    "round_seconds", "devices", "target", "partition", "population", "plot_partition", *MANY, "jobs", *FLOWER)  # fmt: skip
WRITTEN = {"application": "APP", "overrides": "--set", "start": "--from"}


def refuse_idle(args: argparse.Namespace) -> None:
    """Raises InputError for an option that what is asked for does not use: it would be ignored."""
    if args.flower_app is not None:
        refuse(args, BESIDE_FLOWER_APP, "has no part in --flower-app")
        return
    refuse(args, FLOWER, "needs --flower-app")
    if args.replay is not None:
        refuse(args, BESIDE_REPLAY, "has no part in --replay: the manifest says it")
        return
    if args.partition or args.plot_partition is not None:
        refuse(args, ("population",), "makes its own clients: no --partition, no picture of all of them")
    if experiment.asked_for(args):
        refuse(args, ("target",), "has no part in an experiment")
    else:
        refuse(args, ("jobs",), "needs --seeds or --sweep")
    if not args.devices:
        refuse(args, ("target",), "needs --devices")
    if not args.device_states:
        refuse(args, ("round_seconds",), "needs --device-states")


def refuse(args: argparse.Namespace, keys: tuple[str, ...], why: str) -> None:
    defaults = argparse.ArgumentParser()
    common_options(defaults)
    for part in OPTIONS:
        part.add_options(defaults)
    for key in keys:
        if getattr(args, key) != defaults.get_default(key):
            raise InputError(f"{WRITTEN.get(key, '--' + key.replace('_', '-'))} {why}", remedy="leave it out")


def run_simulate(args: argparse.Namespace) -> int:
    refuse_idle(args)
    if args.flower_app is not None:
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
