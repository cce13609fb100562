"""What all commands share: the common options, one JSON document on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fl_core.contracts.errors import FieldfleetError, InputError

Subparsers = Any  # argparse's _SubParsersAction is private
Run = Callable[[argparse.Namespace], int | None]
LOG = "history.jsonl"
LOG_FACTS: ContextVar[Mapping[str, Any]] = ContextVar("LOG_FACTS", default=MappingProxyType({}))  # of what runs here


def common_options(parser: argparse.ArgumentParser, *, config: bool = True) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document to stdout")
    parser.add_argument("--verbose", action="store_true", help="log debug messages to stderr")
    if config:
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            dest="overrides",
            help="override a key of the preset; may be repeated",
        )
        parser.add_argument("--preset", default="default", help="the application's preset (default: default)")
        parser.add_argument("--seed", type=int, default=0, help="seed of every random stream (default: 0)")


def command(subparsers: Subparsers, name: str, run: Run, *, help: str, config: bool = True) -> argparse.ArgumentParser:
    """Add a command with the common options; ``run(args)`` returns an exit code (None = 0)."""
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=help)
    common_options(parser, config=config)
    parser.set_defaults(run=run)
    return parser


def standalone(parser: argparse.ArgumentParser, run: Run, arguments: Sequence[str] | None) -> int:
    """The exit code of a command that an application's own module is: an error goes to stderr with its remedy."""
    args = parser.parse_args(arguments)
    try:
        return run(args) or 0
    except FieldfleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


def emit(args: argparse.Namespace, document: dict[str, Any], human: str | Callable[[], None]) -> None:
    """The result: JSON on stdout with --json, else text (or a printing function)."""
    if args.json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")  # the whole document or nothing
    elif callable(human):
        human()
    else:
        print(human)


def output_folder(path: Path, *, resume: bool = False) -> Path:
    """Refuse an --out that exists and is not empty, before any work starts (unless the run resumes).

    What a run killed before its first checkpoint leaves behind (temporaries, a log) does not count: it begins again.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path}: is a file")
    if not resume and path.is_dir() and any(not (p.name.startswith(".") or p.name == LOG) for p in path.iterdir()):
        raise InputError(f"--out {path}: is not empty", remedy="name a new folder, or remove this one")
    return path


class JsonLines(logging.Formatter):
    """Structured logs: one JSON object a line on stderr."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(LOG_FACTS.get())
        entry.update(getattr(record, "facts", {}))
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def start_logging(*, verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for room in ("fl_core", "fl_server", "fl_clients", "hpc_trainer", "edge_export", "simulations", "fieldfleet"):
        logging.getLogger(room).setLevel(logging.DEBUG if verbose else logging.INFO)
