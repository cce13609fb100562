"""``fieldfleet data pack|check``: a data set as the application's pipeline makes it, in shards mapped into memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fl_core.contracts.cli import Subparsers, command, emit, output_folder
from fl_core.contracts.errors import ExitCode, InputError
from fl_core.learning.sources import data_option


def add_commands(subparsers: Subparsers) -> None:
    text = "data at scale: examples packed once, read from memory-mapped shards"
    group: Any = subparsers.add_parser("data", help=text, description=text)
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    pack = command(actions, "pack", run_pack, help="make the examples of a data set once, for --data of other commands")
    pack.add_argument("application", metavar="APP")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR")
    pack.add_argument("--shard-mb", type=int, default=256, metavar="N", help="size of a shard (default: 256)")
    data_option(pack)
    check = command(actions, "check", run_check, help="hash every file of a packed data set", config=False)
    check.add_argument("folder", type=Path, metavar="DIR")


def run_pack(args: argparse.Namespace) -> int:
    from fl_core.learning import packed
    from fl_core.learning.application import application
    from fl_core.learning.sources import open_data

    app = application(args.application)
    config = app.configure(args.overrides, preset=args.preset)
    if args.shard_mb < 1:
        raise InputError(f"--shard-mb {args.shard_mb}: at least 1")
    output_folder(args.out)
    found = open_data(app, config, args.data, seed=args.seed)
    index = packed.pack(app, config, found.raw.examples(config), found.origin, args.out, args.shard_mb << 20)
    emit(args, _facts(args.out, index), f"{args.out}: {_words(index)}; give it as --data {args.out}")
    return ExitCode.DONE


def run_check(args: argparse.Namespace) -> int:
    from fl_core.learning import packed

    index = packed.check(args.folder)
    emit(args, _facts(args.folder, index), f"{args.folder}: {_words(index)}; every byte is as it was packed")
    return ExitCode.DONE


def _facts(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    size = sum(f["bytes"] for f in index["files"].values())
    names = ("application", "origin", "examples", "arrays")
    return {"folder": str(folder), **{k: index.get(k) for k in names}, "shards": len(index["shards"]), "bytes": size}


def _words(index: dict[str, Any]) -> str:
    size = sum(f["bytes"] for f in index["files"].values())
    return f"{index['examples']:,} examples of {index['application']} in {len(index['shards'])} shards, {size / 1e6:,.1f} MB"
