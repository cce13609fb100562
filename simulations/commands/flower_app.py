"""``fieldfleet simulate --flower-app DIR``: an unmodified Flower project over our own workers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fl_core.contracts.cli import emit
from fl_core.contracts.errors import GoalMissed, InputError
from fl_core.contracts.progress import Progress

if TYPE_CHECKING:
    from simulations.apps.grid import Tally


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Flower projects")
    group.add_argument(
        "--flower-app", type=Path, metavar="DIR", help="run this unmodified Flower project in place of an application"
    )
    group.add_argument("--num-clients", type=int, metavar="N", help="its clients (default: as the project says, or 2)")
    group.add_argument(
        "--run-config",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of its [tool.flwr.app.config]; or one .toml file",
    )
    group.add_argument("--in-process", action="store_true", help="its clients in this process, for a debugger")


def run(args: argparse.Namespace) -> int:
    from simulations.apps.project import read_project
    from simulations.apps.run import simulate_app

    project = read_project(args.flower_app, args.run_config, rounds=args.rounds)
    count = project.num_clients if args.num_clients is None else args.num_clients
    if count < 1:
        raise InputError(f"--num-clients {count}: at least one is needed")
    with Progress(f"flower app {project.name}", None) as bar:

        def on_reply(tally: Tally) -> None:
            bar.update(tally.replies.total(), shown(tally))

        result = simulate_app(
            project,
            num_clients=count,
            seed=args.seed,
            workers=0 if args.in_process else args.workers or None,
            on_reply=on_reply,
        )
    tally, total = result.tally, result.tally.replies.total()
    document = {
        "flower_app": project.name,
        "version": project.version,
        "num_clients": count,
        "run_config": dict(project.run_config),
        "replies": dict(tally.replies),
        "failed": dict(tally.failed),
        "reasons": tally.reasons,
        "start_seconds": result.start_s,
        "seconds": result.main_s,
        "replies_per_second": total / result.main_s,
    }
    emit(
        args,
        document,
        f"{project.name} {project.version}: {total} replies of {count} clients ({shown(tally)}) in {result.main_s:.1f} s, "
        f"{total / result.main_s:.1f} a second",
    )
    if total and tally.failed.total() == total:
        raise GoalMissed(f"{project.name}: all {total} replies were errors", remedy=tally.reasons[0])
    return 0


def shown(tally: Tally) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.replies.items())) or "none"
    return f"{counts}; {tally.failed.total()} failed" if tally.failed else counts
