"""Run every benchmark in turn: each is a module of this package with ``main(arguments)``.

Exit code: the worst of theirs, as in ``fl_core.contracts.errors``; 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import benchmarks
from fl_core.contracts.errors import FieldfleetError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", add_help=False)
    parser.add_argument("names", nargs="*", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="the smallest useful run of each")
    parser.add_argument("-h", "--help", action="store_true", help="this message, or that of the one benchmark named")
    args, options = parser.parse_known_args()
    if args.help and len(args.names) != 1:
        parser.print_help()
        return 0
    options += ["--help"] if args.help else []
    if options and len(args.names) != 1:
        parser.error(f"{' '.join(options)}: options of one benchmark need its name, and only that one")
    known = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))
    unknown = set(args.names) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return max(run(name, [*(["--quick"] if args.quick else []), *options]) for name in args.names or known)


def run(name: str, options: list[str]) -> int:
    print(f"== {name}", flush=True)
    try:
        return int(importlib.import_module(f"benchmarks.{name}").main(options) or 0)
    except FieldfleetError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
