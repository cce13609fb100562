"""``fieldfleet pretrain``: alone, under torchrun or srun, or starting torchrun itself."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.cli import Subparsers, command, emit, output_folder
from fl_core.contracts.errors import DataError, EnvironmentFault, ExitCode, InputError
from fl_core.contracts.progress import Progress
from fl_core.learning.application import Application, application
from fl_core.learning.partition import split_clients
from fl_core.learning.sources import FoundData, data_folder, data_option, open_data
from hpc_trainer import verify_command
from hpc_trainer.binding import CHOICES, bind

PROCESS_FAILED = "a training process ended with an error; its message is above"


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "pretrain", run_pretrain, help="train centrally and write a checkpoint")
    parser.add_argument("application", metavar="APP")
    data_option(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="run folder; an interrupted run is taken up"
    )
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="CKPT", help="start from this checkpoint (default: a fresh model)"
    )
    parser.add_argument("--procs", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="a node's own disk: packed --data are copied there first, once"
    )
    parser.add_argument(
        "--bind",
        choices=CHOICES,
        default="none",
        help="cores: each process on its own share of the node's, by NUMA node",
    )
    verify_command.add_command(subparsers)


def run_pretrain(args: argparse.Namespace) -> int:
    from fl_core.learning.start import start_from
    from fl_core.optimizers import build_optimizer
    from hpc_trainer.processes import under_launcher

    app = application(args.application)
    config = app.configure(args.overrides, preset=args.preset)
    if args.procs < 1:
        raise InputError(f"--procs {args.procs}: at least one process is needed")
    if args.scratch:
        args.data = staged(app, args.data, args.scratch)
    start = start_from(app, config, args.start) if args.start else None
    output_folder(args.out, resume=any(args.out.glob("epoch-*")) if args.out.is_dir() else False)
    if under_launcher() or args.procs == 1:
        return train_here(args, app, config, open_data(app, config, args.data, seed=args.seed), start)
    from hpc_trainer.layout import mesh_sizes
    from hpc_trainer.refusals import refuse_arrangement

    refuse_arrangement(config, mesh_sizes(config.pretrain, args.procs))
    build_optimizer(app.build_model(config), config.optimizer)
    training_data(app, config, open_data(app, config, args.data, seed=args.seed), args.seed)  # refused before any start
    return start_torchrun(args.procs)


def staged(app: Application, data: str | None, scratch: Path) -> str:
    """Where the packed data set lies now."""
    from fl_core.learning.packed import stage

    folder = data_folder(app, data)
    if folder is None:
        raise InputError("--scratch: generated data are not on a disk", remedy="name packed data with --data")
    return str(stage(folder, scratch))


def start_torchrun(procs: int) -> int:
    """This very command again, under torchrun on loopback; its output is ours."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    launcher = [
        *(sys.executable, "-m", "hpc_trainer.launch", "--nnodes", "1", "--nproc-per-node", str(procs)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", "fieldfleet", *sys.argv[1:]),
    ]
    process = subprocess.Popen(launcher, env=environment)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # torchrun passes SIGTERM on to the processes, which checkpoint
        signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code not in set(ExitCode) - {ExitCode.GOAL_MISSED}:  # 1 is Python's own: a traceback, above; or killed
        raise EnvironmentFault(PROCESS_FAILED)
    return code


def training_data(app: Application, config: Any, found: FoundData, seed: int) -> Any:
    """Training and validation examples of the clients whose data the centre holds; held-out clients stay out."""
    from fl_core.learning.partition import client_data
    from hpc_trainer.trainer import TrainingData

    examples = found.raw.examples(config)
    clients, _ = split_clients(examples.clients(), config.data.holdout_fraction, seed)
    if config.pretrain.client_share < 1:
        _, clients = split_clients(clients, config.pretrain.client_share, seed + 1)
    parts = [client_data(examples.of_clients([c]), c, config.data.validation_fraction, seed) for c in clients]
    if not parts or not sum(len(p.train) for p in parts):
        raise DataError(f"{found.origin}: no training examples are left for {app.name}")
    return TrainingData(
        train=concatenate([p.train for p in parts]),
        validation=concatenate([p.validation for p in parts]),
        clients=clients,
    )


def concatenate(parts: list[Any]) -> Any:
    import numpy as np

    from fl_core.learning.examples import Examples

    return Examples(
        {k: np.concatenate([p.inputs[k] for p in parts]) for k in parts[0].inputs},
        np.concatenate([p.targets for p in parts]),
        {k: np.concatenate([p.columns[k] for p in parts]) for k in parts[0].columns},
    )


def train_here(
    args: argparse.Namespace, app: Application, config: Any, found: FoundData, start: Checkpoint | None
) -> int:
    import torch

    from hpc_trainer.processes import join, on_this_node
    from hpc_trainer.signals import StopSignals
    from hpc_trainer.trainer import EpochRecord, Trainer, read_training_history

    local_rank, local_size = on_this_node()
    cores = len(os.sched_getaffinity(0)) // local_size
    if args.bind == "cores":
        cores = len(bind(local_rank, local_size))
    processes, stop = join(), StopSignals()
    if processes.world > 1 and processes.device.type == "cpu":
        torch.set_num_threads(max(1, cores))
    try:
        data = training_data(app, config, found, args.seed)
        quiet = not processes.is_main
        with Progress(f"pretrain {app.name}", config.pretrain.epochs, quiet=quiet) as bar:

            def on_epoch(record: EpochRecord) -> None:
                shown = record.validation.get(app.primary_metric)
                metric = f" {app.primary_metric} {shown:.3f}" if shown is not None else ""
                bar.update(record.epoch, f"loss {record.loss:.4f}{metric}")

            trainer = Trainer(
                app, config, data,
                processes=processes, out=args.out, seed=args.seed, on_epoch=on_epoch, stop_asked=stop.asked,
                start=start,
            )  # fmt: skip
            final = trainer.run()
        if not processes.is_main:
            return 0
        manifest = checkpoints.load(final).manifest
        document = {
            "application": app.name,
            "checkpoint": str(final),
            "model_sha256": manifest.model_sha256,
            "data": found.origin,
            "processes": processes.world,
            "num_examples": len(data.train),
            "clients": len(data.clients),
            "metrics": manifest.metrics,
            "history": read_training_history(args.out),
        }
        shown = ", ".join(f"{k} {v:.4f}" for k, v in manifest.metrics.items())
        emit(
            args,
            document,
            f"{final}: {app.name} trained on {len(data.train)} examples of {len(data.clients)} {app.client_term}s; validation {shown or 'none'}",
        )
        return 0
    finally:
        processes.close()
