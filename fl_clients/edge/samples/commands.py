"""``fieldfleet agent data``: look into, feed and copy out the samples of a device. Works beside a running agent."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError

if TYPE_CHECKING:
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.samples.store import SampleStore
    from fl_clients.edge.settings import AgentSettings


def add_data_commands(inner: Subparsers) -> None:
    text = "this device's samples: status, add, label, quarantine, export-snapshot"
    group: Any = inner.add_parser("data", help=text, description=text)
    group.add_argument("home", type=Path, metavar="HOME")
    actions = group.add_subparsers(dest="data_command", required=True, metavar="ACTION")
    _of_one(command(actions, "status", run_status, help="how many there are, and how old", config=False))
    add = _of_one(command(actions, "add", run_add, help="take files now, past the inbox", config=False))
    add.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="in the application's format; its name is the id"
    )
    add.add_argument("--id", default="", help="of a single file")
    add.add_argument("--label", metavar="LABEL", help="of a single file; JSON, or a plain text")
    label = _of_one(command(actions, "label", run_label, help="label a sample, now or before it comes", config=False))
    label.add_argument("id", metavar="ID")
    label.add_argument("label", metavar="LABEL", help="JSON, or a plain text")
    aside = _of_one(command(actions, "quarantine", run_quarantine, help="what was damaged, and why", config=False))
    aside.add_argument("--limit", type=int, default=100)
    out = _of_one(
        command(actions, "export-snapshot", run_export, help="the labelled samples as a data set", config=False)
    )
    out.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder, for --data of any command")


def _of_one(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--application", default="", metavar="APP", help="whose (needed where there are several)")
    return parser


def run_status(args: argparse.Namespace) -> int:
    from fl_clients.edge.samples.index import SampleIndex, is_store
    from fl_clients.edge.samples.keeper import places

    home, settings = _home(args)
    document: dict[str, Any] = {}
    for name, (store, inbox) in places(home, settings).items():
        if args.application not in ("", name):
            continue
        summary: dict[str, Any] = {}
        if is_store(store):
            index = SampleIndex(store)
            summary = index.summary()
            index.close()
        document[name] = {"enabled": settings.samples.enabled, "inbox": str(inbox), "store": str(store), **summary}
    emit(args, document, lambda: _print_status(document))
    return 0


def _print_status(document: dict[str, Any]) -> None:
    for name, facts in document.items():
        print(f"{name}: files go to {facts['inbox']}{'' if facts['enabled'] else ' (samples.enabled is false)'}")
        if "samples" not in facts:
            print("  no samples yet")
            continue
        print(f"  {facts['samples']} samples, {facts['labelled']} labelled, {facts['bytes'] / 2**20:.1f} MiB")
        if facts["samples"]:
            print(f"  from {_moment(facts['oldest'])} to {_moment(facts['newest'])}")
        print(f"  {facts['waiting_labels']} labels wait for their sample; {facts['quarantined']} quarantined")
        print(f"  gone: {facts['expired']} over the age, {facts['over_quota']} over the quota")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def run_add(args: argparse.Namespace) -> int:
    if len(args.files) > 1 and (args.id or args.label is not None):
        raise InputError("--id and --label are of a single file")
    with _store(args) as store:
        new = 0
        for file in args.files:
            if not file.is_file():
                raise InputError(f"{file}: no such file")
            label = None if args.label is None else _value(args.label)
            new += store.add_file(args.id or file.stem, file, file.stat().st_mtime, label)
        document = {"added": new, "repeated": len(args.files) - new}
    emit(args, document, f"{document['added']} added, {document['repeated']} were there already")
    return 0


def run_label(args: argparse.Namespace) -> int:
    with _store(args) as store:
        state = store.label(args.id, _value(args.label))
    emit(args, {"id": args.id, "state": state}, f"{args.id}: {state}")
    return 0


def run_quarantine(args: argparse.Namespace) -> int:
    with _store(args) as store:
        found = store.index.quarantined(args.limit)
        folder = store.folder / "quarantine"
    lines = [f"{_moment(row['time'])}  {row['name']}: {row['reason']}" for row in found]
    emit(args, {"folder": str(folder), "files": found}, "\n".join(lines) or "nothing is quarantined")
    return 0


def run_export(args: argparse.Namespace) -> int:
    import shutil

    from fl_clients.edge.welcome import stored_welcome
    from fl_core.storage import atomic

    if args.out.exists():
        raise InputError(f"{args.out}: exists", remedy="name a new folder")
    found = stored_welcome(_home(args)[0])
    client = found.name if found is not None else "device"
    with _store(args) as store, store.snapshot(None, labelled=True, client=client) as snapshot:
        with atomic.new_folder(args.out) as folder:
            shutil.copytree(snapshot.folder, folder, dirs_exist_ok=True)
        document = {"out": str(args.out), "samples": len(snapshot.ids), "version": snapshot.id}
    emit(args, document, f"{args.out}: {document['samples']} labelled samples")
    return 0


def _home(args: argparse.Namespace) -> tuple[AgentHome, AgentSettings]:
    from fl_clients.edge.home import AgentHome

    home = AgentHome(args.home)
    settings = home.settings()
    names = settings.device.names
    if not names:
        raise InputError(f"{home.settings_file}: device.applications is empty", remedy="name the applications")
    if args.application and args.application not in names:
        raise InputError(f"--application {args.application}: not of this device", remedy=f"one of: {', '.join(names)}")
    return home, settings


@contextmanager
def _store(args: argparse.Namespace) -> Iterator[SampleStore]:
    from fl_clients.edge.samples.keeper import limits_of, places
    from fl_clients.edge.samples.store import SampleStore
    from fl_core.learning.application import application

    home, settings = _home(args)
    names = settings.device.names
    if not args.application and len(names) != 1:
        raise InputError(f"{args.home}: --application is missing", remedy=f"one of: {', '.join(names)}")
    name = args.application or names[0]
    if not settings.samples.enabled:
        raise InputError(f"{home.settings_file}: samples.enabled is false", remedy="[samples] enabled = true")
    with SampleStore(places(home, settings)[name][0], application(name), limits_of(settings.samples)) as store:
        yield store


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
