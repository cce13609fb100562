"""Samples of an export, from the application's generator or from data that the operator gives; never from clients.

Calibration samples set the ranges of int8; check samples, which share no group with them, judge it; golden samples
travel in the bundle. All three are drawn evenly over the clients of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_core.contracts.errors import DataError
from fl_core.learning import seeding
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples

CHECK_EXAMPLES = 2048
CALIBRATION_SEED = 424_242
CHECK_SEED = 424_243
CLIENTS = 64  # of the generator, at first: more only where they hold too few examples


@dataclass(frozen=True)
class Samples:
    """``origin`` says in words where they came from."""

    calibration: Examples
    check: Examples
    golden: Examples
    origin: str


def draw(examples: Examples, count: int, *key: int | str) -> Examples:
    """At most ``count`` examples in a fixed random order, taken from each client in turn."""
    rng = seeding.generator("export samples", *key)
    order = rng.permutation(len(examples))
    client = np.asarray(examples.columns["client"])[order]
    _, inverse = np.unique(client, return_inverse=True)
    turn = np.zeros(len(order), np.int64)
    for k in range(int(inverse.max(initial=-1)) + 1):
        mine = np.flatnonzero(inverse == k)
        turn[mine] = np.arange(len(mine))
    return examples.take(order[np.argsort(turn, kind="stable")[:count]])


def halves(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Two parts of about equal size that share no client where there are two or more, else no group."""
    for column in ("client", "group"):
        names = np.unique(examples.columns[column])
        if len(names) >= 2:
            order = seeding.generator(seed, "export halves").permutation(len(names))
            first = np.isin(examples.columns[column], names[order[: len(names) // 2]])
            return examples.take(first), examples.take(~first)
    raise DataError("the calibration data holds a single group", remedy="give data of at least two clients or groups")


def generated(application: Application, config: Any, seed: int, wanted: int) -> Examples:
    """``wanted`` examples or more, of about as few clients as have them, of CLIENTS at least; fewer where all ``data.clients`` do.

    A preset may generate hundreds of clients to learn from, many more than an export needs.
    """
    most: int = getattr(config.data, "clients", 0)
    clients = min(most, CLIENTS)
    while clients < most:
        part = replace(config, data=replace(config.data, clients=clients))
        examples = application.generate(part, seed).examples(part)
        if len(examples) >= wanted:
            return examples
        clients = max(clients + 1, math.ceil(1.1 * clients * wanted / max(1, len(examples))))
    return application.generate(config, seed).examples(config)


def collect(application: Application, config: Any, calibration: Path | None) -> Samples:
    """Raises DataError when the data cannot be read or holds too few examples."""
    if calibration is None:
        first = generated(application, config, CALIBRATION_SEED, config.export.calibration_examples)
        second = generated(application, config, CHECK_SEED, CHECK_EXAMPLES)
        origin = f"the generator of {application.name}"
    else:
        first, second = halves(application.read(calibration).examples(config), CALIBRATION_SEED)
        origin = "data given by the operator"
    if len(first) < 8 or len(second) < 8:
        raise DataError(
            f"{calibration or origin}: {len(first)} calibration and {len(second)} check examples are too few",
            remedy="give data with at least 8 usable examples in each of two groups",
        )
    export = config.export
    return Samples(
        calibration=draw(first, export.calibration_examples, "calibration"),
        check=draw(second, CHECK_EXAMPLES, "check"),
        golden=draw(second, export.golden_examples, "golden"),
        origin=origin,
    )
