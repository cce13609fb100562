"""``fieldfleet fleet telemetry``: what devices told, each record once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError

if TYPE_CHECKING:
    from fl_server.telemetry import Entry, Telemetry

LIMIT = 100_000


def add_telemetry_command(actions: Subparsers) -> None:
    text = "what devices told (states, inference summaries, failures), each record once and in order"
    telemetry = command(actions, "telemetry", run_telemetry, help=text, config=False)
    telemetry.add_argument("--home", required=True, type=Path, help="the server's home")
    telemetry.add_argument("--device", default="", metavar="NAME", help="of this device only")
    telemetry.add_argument("--kind", default="", help="only this kind: telemetry, inference, worker-failed, ...")
    telemetry.add_argument("--since", type=int, default=None, metavar="CURSOR", help="only what came after this cursor")
    telemetry.add_argument(
        "--reader",
        default="",
        metavar="NAME",
        help="go on where the reader of this name stopped, and remember the place",
    )
    telemetry.add_argument("--limit", type=int, default=1_000, help="at most so many records (default: 1000)")


def run_telemetry(args: argparse.Namespace) -> int:
    from fl_server.home import ServerHome

    _check(args)
    telemetry = ServerHome(args.home).telemetry()
    try:
        reader = telemetry.reader(args.reader) if args.reader else None
        since = reader.cursor if reader is not None else args.since or 0
        last = telemetry.last()
        entries = telemetry.read(since=since, device=args.device, kind=args.kind, limit=args.limit)
        entries = [entry for entry in entries if entry.cursor <= last]
        end = entries[-1].cursor if len(entries) == args.limit else last
        document = _document(telemetry, entries, since, max(since, end))
        emit(args, document, lambda: _print(document))
        sys.stdout.flush()
        if reader is not None:  # only now: what could not be written out is read again
            telemetry.move(args.reader, document["next"])
    finally:
        telemetry.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.reader and (args.since is not None or args.device or args.kind):
        raise InputError("--reader remembers one place in all records", remedy="leave out --since, --device and --kind")
    if not 1 <= args.limit <= LIMIT:
        raise InputError(f"--limit {args.limit}: not from 1 to {LIMIT:,}")
    if args.since is not None and args.since < 0:
        raise InputError(f"--since {args.since}: a cursor is a whole number from 0")


def _document(telemetry: Telemetry, entries: list[Entry], since: int, end: int) -> dict[str, Any]:
    return {
        "entries": [asdict(entry) for entry in entries],
        "next": end,
        "expired": telemetry.expired(since=since, until=end),
        "missing": telemetry.missing(),
    }


def _print(document: dict[str, Any]) -> None:
    for entry in document["entries"]:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        body = json.dumps(entry["body"], sort_keys=True)
        print(f"{entry['cursor']:>8} {moment} {entry['device']:20} {entry['kind']:14} {body}")
    if document["expired"]:
        print(
            f"{document['expired']} records were removed by the server's limits before they were read", file=sys.stderr
        )
    for device, count in document["missing"].items():
        if count:
            print(f"{device}: {count} records were dropped on the device, over its limits", file=sys.stderr)
    print(f"next: --since {document['next']}", file=sys.stderr)
