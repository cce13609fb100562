"""``fieldfleet apps``: the applications and their cards."""

from __future__ import annotations

import argparse
import importlib.resources

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.config import to_table
from fl_core.contracts.installed import known_applications
from fl_core.learning.application import application


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "apps", run_apps, help="list the applications, or show one", config=False)
    parser.add_argument("application", nargs="?", metavar="APP")


def run_apps(args: argparse.Namespace) -> int:
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
