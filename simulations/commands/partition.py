"""Who has which examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clients")
    group.add_argument(
        "--partition",
        default="",
        metavar="NAME:KEY=VALUE,...",
        help="deal the examples out to other clients: iid, dirichlet:alpha=0.3,clients=50, shards, quantity, feature, natural",
    )
    group.add_argument(
        "--population",
        default="",
        metavar="N[:KEY=VALUE,...]",
        help="N clients that draw their examples from all training ones when they are asked for; size=30, alpha=0.5, spread=0",
    )
    group.add_argument(
        "--plot-partition",
        type=Path,
        metavar="FILE.png",
        help="draw how many examples of each label each client has, and end",
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``simulate``."""
    return {"partition": args.partition, "population": args.population}


def plot(args: argparse.Namespace) -> int:
    """``--plot-partition``: needs the application and its data only."""
    import numpy as np

    from fl_core.contracts.cli import emit
    from fl_core.learning.application import application
    from fl_core.learning.sources import open_data
    from fl_core.storage import atomic
    from simulations.partitioners import partitioned
    from simulations.partitioners.picture import picture

    app = application(args.application)
    config = app.configure(args.overrides, preset=args.preset)
    found = open_data(app, config, args.data, seed=args.seed)
    examples = found.raw.examples(config)
    if args.partition:
        examples = partitioned(examples, args.partition, args.seed)
    title = f"{app.name}: {args.partition or 'clients of the data'}"
    atomic.write_bytes(args.plot_partition, picture(examples, app.labels(config), title))
    names, counts = np.unique(examples.columns["client"], return_counts=True)
    document = {
        "application": app.name,
        "partition": args.partition,
        "data": found.origin,
        "picture": str(args.plot_partition),
        "examples": {str(name): int(count) for name, count in zip(names, counts, strict=True)},
    }
    emit(args, document, f"{args.plot_partition}: {len(examples)} examples of {len(names)} clients")
    return 0
