"""``fieldfleet apps``: the applications and their cards; ``apps new NAME`` writes a new one."""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.installed import known_applications
from fl_core.learning.application import application


def add_commands(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "apps", run_apps, help="list the applications, show one, or write a new one", config=False
    )
    parser.add_argument("application", nargs="?", metavar="APP|new", help="show this one; 'new' writes one")
    parser.add_argument("name", nargs="?", metavar="NAME", help="with 'new': its name")
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="with 'new': where its package goes (default: applications/ of a checkout)",
    )


def run_apps(args: argparse.Namespace) -> int:
    if args.application == "new":
        return write_new(args)
    if args.name or args.dir:
        raise InputError("NAME and --dir go with 'apps new'", remedy="fieldfleet apps new NAME [--dir DIR]")
    if args.application:
        return show(args)
    found = [application(name) for name in known_applications()]
    document = {"applications": [{"name": a.name, "title": a.title, "summary": a.summary} for a in found]}
    emit(args, document, "\n".join(f"{a.name:22} {a.summary}" for a in found))
    return 0


def show(args: argparse.Namespace) -> int:
    app = application(args.application)
    config = app.configure()
    presets = list(app.presets())
    document = {
        "name": app.name,
        "title": app.title,
        "summary": app.summary,
        "client": app.client_term,
        "inputs": [spec.__dict__ for spec in app.inputs(config)],
        "outputs": [spec.__dict__ for spec in app.outputs(config)],
        "labels": list(app.labels(config)),
        "primary_metric": app.primary_metric,
        "presets": presets,
        "config": to_table(config),
    }
    package = app.config_type.__module__.rpartition(".")[0]
    readme = importlib.resources.files(package) / "README.md"
    emit(args, document, f"{readme.read_text(encoding='utf-8')}\nPresets: {', '.join(presets)}")
    return 0


def write_new(args: argparse.Namespace) -> int:
    from fieldfleet.new_application import new_application

    if not args.name:
        raise InputError("the new application has no name", remedy="fieldfleet apps new NAME [--dir DIR]")
    folder = new_application(args.name, args.dir)
    package = (folder / "pyproject.toml").is_file()
    steps = [f"pip install --editable {folder}"] if package else []
    steps += [
        f"fieldfleet simulate {args.name} --rounds 5 --out runs/{args.name}",
        f"pytest tests/conformance -k {args.name}",
    ]
    emit(
        args,
        {"application": args.name, "folder": str(folder), "next": steps},
        "\n  ".join([f"{folder} written; next:", *steps]),
    )
    return 0
