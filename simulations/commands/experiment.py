"""``fieldfleet simulate APP --seeds N --sweep KEY=A,B``: a grid of settings and seeds; and ``--replay MANIFEST``."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts.cli import emit
from fl_core.contracts.errors import GoalMissed, InputError
from fl_core.contracts.progress import Progress
from simulations.commands import federation

if TYPE_CHECKING:
    from simulations.experiments.plan import Cell
    from simulations.experiments.run import State

KEYS = ("sweep", "parquet", "tensorboard", "mlflow")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experiments: --out then holds one folder a cell, and the report")
    group.add_argument("--seeds", type=int, metavar="N", help="as many seeds, from --seed on")
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SECTION.KEY=A,B,...",
        help="run every value; may be repeated: every combination",
    )
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    group.add_argument("--parquet", action="store_true", help="each client's results of each round: clients.parquet")
    group.add_argument("--tensorboard", action="store_true", help="event files of each cell")
    group.add_argument("--mlflow", default="", metavar="sqlite:///FILE", help="one MLflow run a cell in this store")
    group.add_argument(
        "--replay", type=Path, metavar="MANIFEST", help="repeat this cell and compare its model, bit for bit"
    )


def asked_for(args: argparse.Namespace) -> bool:
    return args.seeds is not None or any(getattr(args, key) for key in KEYS)


def run(args: argparse.Namespace) -> int:
    from fl_core.learning.application import application
    from simulations.experiments.report import outcomes, summary, write_report
    from simulations.experiments.run import prepare, run_cells
    from simulations.experiments.trackers import Tracking

    tracking = Tracking(
        parquet=args.parquet, tensorboard=args.tensorboard, mlflow=args.mlflow, experiment=args.out.resolve().name
    )
    tracking.check()
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: at least one is needed")
    app, cells = application(args.application), plan(args)
    todo = prepare(args.out, cells)
    metric = app.primary_metric
    with Progress(f"{len(cells)} cells of {app.name}", sum(c.rounds for c in todo)) as bar:

        def on_state(state: State) -> None:
            value = state.metrics.get(metric)
            shown = "" if value is None else f"{metric} {value:.3f}, "
            bar.update(state.rounds, f"{shown}{state.updates_per_second:.0f} updates/s")

        failed = run_cells(args.out, todo, tracking, jobs=args.jobs, on_state=on_state)
    found = outcomes(args.out, cells)
    title = f"{app.title}: {' x '.join(key for key in parsed_sweeps(args)) or 'seeds'}"
    write_report(args.out, found, failed, metric=metric, higher_is_better=app.higher_is_better, title=title)
    rows = summary(found)
    document = {
        "application": app.name,
        "report": str(args.out / "report.html"),
        "cells": [{"cell": o.cell.name, "settings": o.cell.settings, "seed": o.cell.seed, **o.result} for o in found],
        "settings": rows,
        "failed": failed,
    }
    lines = [f"{row['setting']}: {_shown(row, metric)} over {len(row['seeds'])} seeds" for row in rows]
    emit(
        args, document, "\n".join([*lines, f"{args.out / 'report.html'}: {len(found)} of {len(cells)} cells finished"])
    )
    if failed:
        name, reason = next(iter(failed.items()))
        raise GoalMissed(f"{len(failed)} of {len(cells)} cells failed: {name}: {reason}", remedy="repeat the command")
    return 0


def _shown(row: dict[str, Any], metric: str) -> str:
    found = row["metrics"].get(metric)
    return f"{metric} not measured" if found is None else f"{metric} {found['mean']:.4f} ± {found['half_width']:.4f}"


def parsed_sweeps(args: argparse.Namespace) -> dict[str, list[Any]]:
    from simulations.experiments.plan import parse_sweeps

    return parse_sweeps(args.sweep)


def plan(args: argparse.Namespace) -> list[Cell]:
    """Every cell, checked: a wrong value of the last setting is found before the first one runs."""
    from fl_core.contracts.config import to_table
    from fl_core.learning.sources import GENERATED, data_folder
    from fl_server.federation import read_federation
    from simulations.experiments.cell import this_application_version, versions
    from simulations.experiments.plan import Cell, override, settings_of

    count = 1 if args.seeds is None else args.seeds
    if count < 1:
        raise InputError(f"--seeds {count}: at least one is needed")
    if args.out.is_file():
        raise InputError(f"--out {args.out}: is a file")
    cells = []
    for settings in settings_of(parsed_sweeps(args)):
        given = [*args.overrides, *(override(k, v) for k, v in settings.items())]
        one = argparse.Namespace(**{**vars(args), "overrides": given, "out": args.out / "cell that is not there"})
        checked = read_federation(one)
        folder = data_folder(checked.application, args.data)
        for seed in range(args.seed, args.seed + count):
            cells.append(
                Cell(
                    application=checked.application.name,
                    application_version=this_application_version(checked.application.name),
                    config=to_table(checked.config),
                    settings=settings,
                    seed=seed,
                    rounds=args.rounds,
                    data=GENERATED if folder is None else str(folder.resolve()),
                    start=str(args.start.resolve()) if args.start else "",
                    start_sha256=checked.start.manifest.model_sha256 if checked.start else "",
                    options=cell_options(args),
                    versions=versions(),
                )
            )
    return cells


def cell_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of ``simulate``; with several cells at a time each has its share of the cores."""
    from fl_core.learning.sources import GENERATED
    from simulations.engine.processes import usable_cores

    options = federation.settings(args)
    for key in ("devices", "device_states"):
        if options[key] not in ("", GENERATED):
            options[key] = str(Path(options[key]).resolve())  # a manifest is replayed from any folder
    if not options.get("workers") and args.jobs > 1:
        options["workers"] = max(1, usable_cores() // args.jobs)
    return options


def replay(args: argparse.Namespace) -> int:
    """Raises GoalMissed when the model is another one, with the versions that differ."""
    from simulations.experiments.cell import simulate_cell, versions
    from simulations.experiments.plan import read_cell

    cell = read_cell(args.replay)
    if not cell.model_sha256:
        raise InputError(f"{args.replay}: this cell has not been finished", remedy="repeat the command that began it")
    options = {**cell.options, "workers": args.workers} if args.workers else cell.options
    asked = replace(cell, data=args.data or cell.data, options=options)
    with ExitStack() as stack:
        out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fieldfleet-")))
        bar = stack.enter_context(Progress(f"replay {cell.name}", cell.rounds))
        _, found = simulate_cell(asked, out, lambda record: bar.update(record.round))
        from fl_core.contracts import checkpoint as checkpoints

        sha = checkpoints.load(found.final).manifest.model_sha256
    same = sha == cell.model_sha256
    changed = {k: f"{v} -> {versions().get(k)}" for k, v in cell.versions.items() if versions().get(k) != v}
    document = {"cell": cell.name, "model_sha256": sha, "expected_sha256": cell.model_sha256, "equal": same}
    emit(
        args,
        {**document, "versions_changed": changed},
        f"{cell.name}: model {sha[:16]}, {'the same' if same else 'another one'}",
    )
    if not same:
        words = ", ".join(f"{k} {v}" for k, v in changed.items()) or "the versions are the same: another processor?"
        raise GoalMissed(f"{cell.name}: the model is not the one of the manifest", remedy=words)
    return 0
