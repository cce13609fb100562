"""What all partitioners share: units of examples that stay together, their labels, and a least size of clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.config import number
from fl_core.contracts.errors import InputError
from fl_core.learning.examples import Examples

Ids = npt.NDArray[np.int64]
BINS = 10  # of a continuous target


@dataclass(frozen=True, kw_only=True)
class ClientsOptions:
    """clients: how many there will be; min_size: examples that each has at least."""

    clients: int = number(10, low=1, high=1_000_000)
    min_size: int = number(1, low=0)


@dataclass(frozen=True)
class Units:
    """Groups of examples. sizes: (U,) examples in each; labels: (U,) most frequent label, numbered from 0;
    features: (U, D) means of the model's inputs, computed when asked for; names: of what ``by`` names.
    """

    sizes: Ids
    labels: Ids
    examples: Examples
    unit_of: Ids
    names: npt.NDArray[Any]
    column: Ids

    def __len__(self) -> int:
        return len(self.sizes)

    def features(self) -> npt.NDArray[np.float64]:
        x = np.hstack(
            [
                np.asarray(v, np.float64).reshape(len(v), -1)
                for v in self.examples.inputs.values()
                if v.dtype.kind in "fiu"
            ]
        )
        sums = np.zeros((len(self), x.shape[1]))
        np.add.at(sums, self.unit_of, x)
        return sums / self.sizes[:, None]


def units_of(examples: Examples, by: str = "") -> tuple[Units, Ids]:
    """(units, number of the unit of each example). by: a column to deal by (``natural``). Raises InputError."""
    if not len(examples):
        raise InputError("there are no examples to deal out")
    groups = examples.columns.get("group", np.arange(len(examples)))
    if by and by not in examples.columns:
        known = ", ".join(sorted(examples.columns))
        raise InputError(f"--partition: these examples have no column {by!r}", remedy=f"known: {known}")
    _, first, unit_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    unit_of = unit_of.reshape(-1)
    found, column = np.unique(examples.columns[by][first] if by else np.zeros(len(first)), return_inverse=True)
    labels = majority(label_numbers(examples), unit_of, len(sizes))
    return Units(sizes, labels, examples, unit_of, found.astype(str), column.reshape(-1)), unit_of


def label_numbers(examples: Examples) -> Ids:
    """(N,) from 0: classes as they are, a continuous target in ten bins of equal size. Raises InputError."""
    targets = np.asarray(examples.targets)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:  # masks, fields: the most frequent value of each example, where they are classes
        if targets.dtype.kind not in "iub":
            targets = targets.reshape(len(targets), -1).mean(axis=1)
        else:
            flat = targets.reshape(len(targets), -1).astype(np.int64)
            targets = np.array([np.bincount(row - row.min()).argmax() + row.min() for row in flat])
    if targets.dtype.kind == "f" and len(np.unique(targets)) > 2 * BINS:
        edges = np.quantile(targets, np.linspace(0, 1, BINS + 1)[1:-1])
        targets = np.searchsorted(edges, targets, side="right")
    numbers: Ids = np.unique(targets, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return numbers


def majority(labels: Ids, unit_of: Ids, units: int) -> Ids:
    counts = np.zeros((units, int(labels.max()) + 1), np.int64)
    np.add.at(counts, (unit_of, labels), 1)
    found: Ids = counts.argmax(axis=1)
    return found


def deal(order: Ids, sizes: Ids, shares: npt.NDArray[np.float64]) -> Ids:
    """(len(order),) client of each unit of ``order``: consecutive runs, as near to the shares of all examples as units allow."""
    ends = np.cumsum(sizes[order])
    middle = (ends - sizes[order] / 2) / ends[-1]
    edges = np.cumsum(shares / shares.sum())[:-1]
    owners: Ids = np.searchsorted(edges, middle, side="right").astype(np.int64)
    return owners


def with_least(owner: Ids, sizes: Ids, clients: int, least: int, spec: str) -> Ids:
    """Units moved, smallest first, from the largest clients to those with fewer than ``least`` examples."""
    owner = owner.copy()
    totals = np.bincount(owner, weights=sizes, minlength=clients).astype(np.int64)
    for poor in np.argsort(totals, kind="stable"):
        while totals[poor] < least:
            rich = int(totals.argmax())
            mine = np.flatnonzero(owner == rich)
            unit = mine[sizes[mine].argmin()] if len(mine) > 1 else -1
            if unit < 0 or totals[rich] - sizes[unit] < max(least, 1):
                raise InputError(
                    f"--partition {spec}: {int(sizes.sum())} examples in {len(sizes)} groups do not give each of "
                    f"{clients} clients {least}",
                    remedy="fewer clients, or a smaller min_size",
                )
            owner[unit] = poor
            totals[rich] -= sizes[unit]
            totals[poor] += sizes[unit]
    return owner
