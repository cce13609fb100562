"""``fieldfleet demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError
from fl_core.contracts.progress import Progress
from fl_core.learning.application import application
from fl_core.learning.sources import data_folder, data_option


def add_commands(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "demo", run_demo, help="the main job on this machine, from pretraining to inference on devices"
    )
    parser.add_argument(
        "--app", default="driver_conflict", metavar="APP", help="the application (default: driver_conflict)"
    )
    data_option(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="default: runs/demo; a former demo there is replaced",
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="federated rounds (default: 20)")
    parser.add_argument("--devices", type=int, default=4, metavar="N", help="agents (default: 4)")


def run_demo(args: argparse.Namespace) -> int:
    import fl_core.report.charts  # noqa: F401  a missing package is told before the work, not after it
    from fieldfleet.demo import Demo, DemoOptions, write_json_report
    from fieldfleet.demo_report import write_html_report

    app = application(args.app)
    config = app.configure(args.overrides, preset=args.preset)
    for name, value, top in (("--rounds", args.rounds, 100_000), ("--devices", args.devices, 64)):
        if not 1 <= value <= top:
            raise InputError(f"{name} {value} is out of range", remedy=f"accepted: 1 to {top}")
    folder = data_folder(app, args.data)
    options = DemoOptions(
        application=app,
        config=config,
        data=str(folder) if folder else "generated",
        out=args.out,
        seed=args.seed,
        rounds=args.rounds,
        devices=args.devices,
        overrides=tuple(args.overrides),
    )
    with StageProgress() as progress:
        results = Demo(options, progress.say).run()
    write_json_report(args.out, results)
    write_html_report(args.out, app, results)
    emit(args, results, lambda: print_summary(app.primary_metric, args.out, results))
    return 0


class StageProgress:
    """One line a stage on stderr, with a bar on a terminal."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Progress | None = None
        self._last = -1

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *unused: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def say(self, stage: str, done: int, total: int, status: str) -> None:
        if stage != self._stage:
            self._close()
            self._stage, self._last = stage, -1
            self._bar = Progress(f"{stage:9}", total).__enter__()
        if done != self._last and self._bar is not None:
            self._last = done
            self._bar.update(done, status)
            sys.stderr.flush()


def print_summary(metric: str, out: Path, results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fieldfleet.demo_report import latency

    table = Table(title=f"{results['application']} on clients never trained on ({results['seconds']:.0f} s)")
    for heading in ("model", metric, "examples", "kB", "ms"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    facts = next(iter(results["bundle"]["targets"].values()))
    for name, found in results["evaluation"].items():
        size, speed = (
            ("-", "-") if name != "bundle" else (f"{facts['bytes'] / 1000:.1f}", f"{latency(facts, 'p50_ms'):.2f}")
        )
        table.add_row(
            name, f"{found['metrics'].get(metric, float('nan')):.4f}", str(found["num_examples"]), size, speed
        )
    Console().print(table)
    print(f"report: {out / 'report.html'}")
