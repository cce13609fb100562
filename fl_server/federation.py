"""What ``server run`` and ``simulate`` have in common: everything a user may have got wrong, found before anything starts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.cli import output_folder
from fl_core.contracts.errors import InputError
from fl_core.learning.application import Application, application
from fl_server.stream import check_mode


@dataclass(frozen=True)
class Federation:
    """An application with its validated configuration, and the checkpoint it starts from (None = a fresh model)."""

    application: Application
    config: Any
    start: Checkpoint | None


def read_federation(args: argparse.Namespace) -> Federation:
    """From ``application``, ``overrides``, ``preset``, ``rounds``, ``start`` and ``out`` of a command line.

    Raises InputError (names, numbers, folders, a checkpoint of another application or another model) or
    IntegrityError (a damaged checkpoint).
    """
    from fl_core.algorithms import build_algorithm
    from fl_core.learning.start import start_from
    from fl_core.optimizers import check_local

    app = application(args.application)
    config = app.configure(args.overrides, preset=args.preset)
    check_local(config.optimizer)
    algorithm = build_algorithm(config.algorithm)
    algorithm.client_update.check(config.optimizer)
    check_mode(config.algorithm, algorithm)
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}: at least one round is needed")
    start = start_from(app, config, args.start) if args.start else None
    output_folder(args.out, resume=any(args.out.glob("round-*")) if args.out.is_dir() else False)
    return Federation(app, config, start)
