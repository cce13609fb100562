"""Splits by client and by group: windows, frames and near-duplicates of one group never part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_core.contracts.errors import DataError, InputError
from fl_core.learning import seeding
from fl_core.learning.examples import ClientData, Examples, Partition, RawData


def split_clients(clients: Sequence[str], fraction: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training, held-out) client names; the held-out share is ``fraction``, at least one where two clients exist."""
    names = sorted(clients)
    if fraction <= 0 or len(names) < 2:
        return tuple(names), ()
    order = seeding.generator(seed, "held-out clients").permutation(len(names))
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    held = {names[i] for i in order[:count]}
    return tuple(n for n in names if n not in held), tuple(n for n in names if n in held)


def split_groups(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """(train, validation) by ``group``: whole groups go to validation until it holds about ``fraction`` of the examples.

    What is not ``trainable`` is left out of train, and kept in validation.
    """
    groups = examples.columns["group"]
    unique, counts = np.unique(groups, return_counts=True)
    if fraction <= 0 or len(unique) < 2:
        empty = np.zeros(0, np.int64)
        return trainable(examples), examples.take(empty)
    order = seeding.generator(seed, "validation groups", *map(str, unique[:1])).permutation(len(unique))
    wanted, held, taken = fraction * len(examples), [], 0
    for i in order[: len(unique) - 1]:
        if taken >= wanted:
            break
        held.append(unique[i])
        taken += int(counts[i])
    mask = np.isin(groups, held)
    return trainable(examples.take(~mask)), examples.take(mask)


def trainable(examples: Examples) -> Examples:
    """Without the examples whose optional column ``trainable`` is false: those are scored, never learned from.

    With an optional column ``copies``, each as many times as it says: a pass over the data sees rare ones more often.
    """
    if "trainable" in examples.columns:
        examples = examples.take(examples.columns["trainable"].astype(bool))
    if "copies" in examples.columns and (examples.columns["copies"] != 1).any():
        examples = examples.take(np.repeat(np.arange(len(examples)), examples.columns["copies"]))
    return examples


def client_data(examples: Examples, client: str, fraction: float, seed: int) -> ClientData:
    train, validation = split_groups(examples, fraction, seeding.key(seed, client))
    return ClientData(client, train, validation)


def share(raw: RawData, part: Partition) -> RawData:
    """The clients of one partition: every ``count``-th, in sorted order. Raises InputError when there are too few."""
    names = raw.client_ids()
    if not 0 <= part.id < part.count:
        raise InputError(f"partition {part.id} of {part.count} does not exist", remedy="partitions count from 0")
    mine = sorted(names)[part.id :: part.count]
    if not mine:
        raise DataError(f"partition {part.id} of {part.count} is empty: the data set has {len(names)} clients")
    return raw.select(mine)
