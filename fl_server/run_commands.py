"""``fieldfleet server start``, ``server run`` and ``fieldfleet runs ...``: a server that stands, and the runs on it."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import GoalMissed, RefusedError
from fl_core.contracts.progress import Progress

if TYPE_CHECKING:
    from fl_server.history import RoundRecord
    from fl_server.home import ServerHome
    from fl_server.run import RunResult
    from fl_server.run_table import RunSpec, RunTable

DEFAULT_WAIT_S = 300.0
ASK_S = 60.0  # one question to the server while waiting for a run


def add_server_runs(actions: Subparsers) -> None:
    start = command(actions, "start", run_start, help="serve devices and runs until stopped", config=False)
    _home_option(start)
    run = command(actions, "run", run_run, help="serve devices and one run, then end")
    _run_options(run)
    run.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="run folder; an interrupted run is taken up"
    )
    run.add_argument("--stay", action="store_true", help="go on serving devices after the last round")
    run.add_argument(
        "--wait",
        type=float,
        default=DEFAULT_WAIT_S,
        metavar="S",
        help="wait for devices at most S seconds (default: 300)",
    )


def add_run_commands(subparsers: Subparsers) -> None:
    text = "the runs of a server that stands: start, stop, resume, wait"
    group: Any = subparsers.add_parser("runs", help=text, description=text)
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = command(actions, "start", run_runs_start, help="begin a run on the running server")
    _run_options(start)
    start.add_argument("--name", default="", help="of the run (default: the application's, with a number)")
    start.add_argument("--wait", action="store_true", help="return when it has ended")
    _home_option(command(actions, "list", run_runs_list, help="all runs and how far they are", config=False))
    for name, run, help in (
        ("show", run_runs_show, "one run, with its rounds"),
        ("stop", run_runs_stop, "stop at a safe point; what is done is kept"),
        ("resume", run_runs_resume, "go on with a run that was stopped or failed"),
        ("wait", run_runs_wait, "return when the run has ended (exit code 1: failed or stopped)"),
    ):
        parser = command(actions, name, run, help=help, config=False)
        parser.add_argument("name", metavar="NAME")
        _home_option(parser)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("application", metavar="APP")
    _home_option(parser)
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="CKPT", help="start from this checkpoint (default: a fresh model)"
    )
    parser.add_argument("--rounds", type=int, required=True, metavar="N")
    parser.add_argument(
        "--min-devices", type=int, metavar="N", help="wait for N devices first (default: algorithm.min_clients)"
    )


def _home_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", required=True, type=Path, help="the server's home")


def run_start(args: argparse.Namespace) -> int:
    """Until SIGTERM or SIGINT; then it drains, and exits with 0. Runs go on at the next start."""
    from fl_server.home import ServerHome
    from fl_server.standing import StandingServer, interruptible

    home = ServerHome(args.home)
    with interruptible() as signals, StandingServer(home) as server:
        resumed = server.runs.resume_all()
        document = {"url": server.superlink.url, "fleet": home.settings.fleet, "resumed": resumed}
        emit(args, document, f"listening on {server.superlink.url}{_going_on(resumed)}")
        sys.stdout.flush()
        signals.stay()
    return 0


def _going_on(resumed: list[str]) -> str:
    return f"; going on with {', '.join(resumed)}" if resumed else ""


def run_run(args: argparse.Namespace) -> int:
    """``start``, one run and its end in one command."""
    from fl_server.history import check_applied
    from fl_server.home import ServerHome
    from fl_server.runs import options_of
    from fl_server.standing import StandingServer, interruptible

    home, out = ServerHome(args.home), args.out.absolute()
    spec = _spec(args, name=re.sub(r"[^A-Za-z0-9._-]", "-", out.name).strip("-._")[:48] or "run", out=str(out))
    spec = dataclasses.replace(spec, wait_s=args.wait)
    options = options_of(home, spec)
    app = options.application
    with (
        interruptible() as signals,
        Progress(f"federate {app.name}", options.num_rounds) as bar,
        StandingServer(home) as server,
    ):
        print(f"listening on {server.superlink.url}", file=sys.stderr, flush=True)
        bar.update(0, "waiting for devices")
        spec = _own_name(server.runs.table, spec)
        server.runs.table.add(spec, attended=True)
        run = server.runs.begin(
            dataclasses.replace(options, name=spec.name),
            attended=True,
            on_round=lambda record: bar.update(record.round, _status(record, app.primary_metric)),
        )
        result = run.result()
        _print_result(args, app.name, result)
        if args.stay:
            signals.stay()
    check_applied(result.history)
    return 0


def _spec(args: argparse.Namespace, *, name: str, out: str) -> RunSpec:
    from fl_server.run_table import RunSpec

    return RunSpec(
        name=name,
        application=args.application,
        rounds=args.rounds,
        out=out,
        start=str(args.start.absolute()) if args.start else "",
        preset=args.preset,
        overrides=tuple(args.overrides),
        seed=args.seed,
        min_devices=args.min_devices,
    )


def _own_name(table: RunTable, spec: RunSpec) -> RunSpec:
    """Two ``server run`` with folders of the same name are two runs."""
    known, number = table.find(spec.name), 1
    name = spec.name
    while known is not None and known.spec.out != spec.out:
        number += 1
        name = f"{spec.name}-{number}"
        known = table.find(name)
    return dataclasses.replace(spec, name=name)


def _status(record: RoundRecord, metric: str) -> str:
    parts = [f"{len(record.clients)} devices"]
    if record.loss is not None:
        parts.append(f"loss {record.loss:.4f}")
    if metric in (found := record.held_out or record.evaluation):
        parts.append(f"{metric} {found[metric]:.3f}")
    missing = [*record.late, *record.refused]
    return " ".join([*parts, *([f"without {', '.join(missing[:3])}"] if missing else [])])


def _print_result(args: argparse.Namespace, application: str, result: RunResult) -> None:
    manifest = checkpoints.load(result.final).manifest
    document = {
        "application": application,
        "checkpoint": str(result.final),
        "model_sha256": manifest.model_sha256,
        "rounds": len(result.history),
        "devices": list(result.devices),
        "clients_seen": manifest.clients_seen,
        "metrics": manifest.metrics,
        "history": [dataclasses.asdict(record) for record in result.history],
    }
    shown = ", ".join(f"{k} {v:.4f}" for k, v in manifest.metrics.items())
    emit(
        args,
        document,
        f"{result.final}: {len(result.history)} rounds over {len(manifest.clients_seen)} devices: {shown or 'not evaluated'}",
    )
    sys.stdout.flush()  # with --stay this process goes on


def run_runs_start(args: argparse.Namespace) -> int:
    from fl_core.contracts.names import checked_name
    from fl_server.control import ask
    from fl_server.home import ServerHome

    home = ServerHome(args.home)
    name = checked_name(args.name, "--name") if args.name else _next_name(home, args.application)
    spec = _spec(args, name=name, out=f"{home.runs_folder.name}/{name}")
    facts = ask(home, "run-start", timeout=300.0, spec=dataclasses.asdict(spec))
    if args.wait:
        return _wait(args, home, name)
    emit(args, facts, f"{name}: running; its folder is {home.path / spec.out}")
    return 0


def _next_name(home: ServerHome, application: str) -> str:
    registry = home.registry()
    try:
        known = {row.spec.name for row in registry.runs.all()}
    finally:
        registry.close()
    return next(name for n in range(1, len(known) + 2) if (name := f"{application}-{n}") not in known)


def run_runs_list(args: argparse.Namespace) -> int:
    from fl_server.home import ServerHome

    home = ServerHome(args.home)
    registry = home.registry()
    try:
        runs = [row.facts() for row in registry.runs.all()]
    finally:
        registry.close()

    def show() -> None:
        for run in runs:
            print(f"{run['name']:24} {run['application']:16} {run['status']:9} {run['rounds_done']} of {run['rounds']}")
        if not runs:
            print(f"{home.path}: no run yet")

    emit(args, {"fleet": home.settings.fleet, "runs": runs}, show)
    return 0


def run_runs_show(args: argparse.Namespace) -> int:
    from fl_server.history import read_history
    from fl_server.home import ServerHome

    home = ServerHome(args.home)
    registry = home.registry()
    try:
        facts = registry.runs.get(args.name).facts()
    finally:
        registry.close()
    history = read_history(home.path / facts["out"])

    def show() -> None:
        for key, value in facts.items():
            print(f"{key:14} {value if value not in (None, '', []) else '-'}")
        for record in history:
            print(f"  round {record.round}: {_status(record, '')}{'' if record.applied else ', changed nothing'}")

    emit(args, {**facts, "history": [dataclasses.asdict(record) for record in history]}, show)
    return 0


def run_runs_stop(args: argparse.Namespace) -> int:
    return _ask(args, "run-stop")


def run_runs_resume(args: argparse.Namespace) -> int:
    return _ask(args, "run-resume")


def _ask(args: argparse.Namespace, what: str) -> int:
    from fl_server.control import ask
    from fl_server.home import ServerHome

    facts = ask(ServerHome(args.home), what, timeout=120.0, name=args.name)
    emit(args, facts, f"{args.name}: {facts['status']}, {facts['rounds_done']} of {facts['rounds']} rounds")
    return 0


def run_runs_wait(args: argparse.Namespace) -> int:
    from fl_server.home import ServerHome

    return _wait(args, ServerHome(args.home), args.name)


def _wait(args: argparse.Namespace, home: ServerHome, name: str) -> int:
    """Through restarts of the server, too."""
    from fl_server.control import ask

    while True:
        try:
            facts = ask(home, "run-wait", timeout=ASK_S + 30, name=name, seconds=ASK_S)
        except RefusedError:
            registry = home.registry()
            facts = registry.runs.get(name).facts()
            registry.close()
            time.sleep(1.0)
        if facts["status"] != "running":
            break
    emit(args, facts, f"{name}: {facts['status']}, {facts['rounds_done']} of {facts['rounds']} rounds")
    if facts["status"] != "finished":
        raise GoalMissed(f"run {name!r} is {facts['status']}", remedy=str(facts["error"] or "fieldfleet runs resume"))
    return 0
