"""One federation of one application: options, run and result."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.cli import emit
from fl_core.contracts.progress import Progress
from fl_core.learning.sources import data_option, open_data
from simulations.commands import devices, engine, partition

LISTED = 100_000  # clients that the document names


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("application", nargs="?", metavar="APP")
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="CKPT", help="start from this checkpoint (default: a fresh model)"
    )
    data_option(parser)
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder; an interrupted run is taken up")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``simulate``, from every group of options that has some."""
    return {**engine.settings(args), **devices.settings(args), **partition.settings(args)}


def run(args: argparse.Namespace) -> int:
    from fl_server.federation import read_federation
    from fl_server.history import RoundRecord, check_applied
    from simulations.simulate import simulate

    federation = read_federation(args)
    app, config, start = federation.application, federation.config, federation.start
    found = open_data(app, config, args.data, seed=args.seed)
    began, updates = time.monotonic(), 0
    with Progress(f"simulate {app.name}", args.rounds) as bar:

        def on_round(record: RoundRecord) -> None:
            nonlocal updates
            updates += len(record.clients)
            speed = updates / (time.monotonic() - began)
            metric = (record.held_out or record.evaluation).get(app.primary_metric)
            shown = f" {app.primary_metric} {metric:.3f}" if metric is not None else ""
            loss = record.loss if record.loss is not None else float("nan")
            bar.update(record.round, f"loss {loss:.4f}{shown}, {speed:.0f} updates/s")

        result = simulate(
            app,
            config,
            found.raw,
            start=start,
            num_rounds=args.rounds,
            seed=args.seed,
            out=args.out,
            on_round=on_round,
            **settings(args),
        )
    manifest = checkpoints.load(result.final).manifest
    facts = devices.results(args, app, result.history)
    document = {
        **facts,
        "application": app.name,
        "checkpoint": str(result.final),
        "model_sha256": manifest.model_sha256,
        "data": found.origin,
        "partition": args.partition,
        "population": args.population,
        "engine": result.engine,
        "rounds": len(result.history),
        "clients": list(result.clients) if len(result.clients) <= LISTED else [],
        "num_clients": len(result.clients),
        "held_out": list(result.held_out),
        "metrics": manifest.metrics,
        "history": [asdict(r) for r in result.history],
    }
    shown = ", ".join(f"{k} {v:.4f}" for k, v in manifest.metrics.items())
    emit(
        args,
        document,
        f"{result.final}: {len(result.history)} rounds over {len(result.clients)} {app.client_term}s; "
        f"on {len(result.held_out)} held-out {app.client_term}s: {shown or 'not evaluated'}"
        f"{devices.shown(facts)}; engine: {result.engine}",
    )
    check_applied(result.history)
    return 0
