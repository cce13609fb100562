"""Examples: the model's inputs (after the torch-free pipeline), targets, and what identifies each example."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """N examples in memory. Every array has N as its first dimension.

    inputs: name -> array, exactly what the model (torch or ONNX) is fed.
    targets: what the loss and the metrics compare with.
    columns: at least ``example_id`` (str), ``client`` (str) and ``group`` (str: never split a group); optionally
        ``trainable`` (bool: false = scored, never learned from) and ``copies`` (int: how often a pass of training sees it).
    """

    inputs: Mapping[str, Array]
    targets: Array
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Array | Sequence[int] | slice) -> Examples:
        """By integer index, boolean mask or slice."""
        i: Any = index if isinstance(index, slice) else np.asarray(index)
        if not isinstance(i, slice) and i.size == 0:
            i = i.astype(np.int64)
        return Examples(
            {k: v[i] for k, v in self.inputs.items()}, self.targets[i], {k: v[i] for k, v in self.columns.items()}
        )

    def clients(self) -> tuple[str, ...]:
        return tuple(sorted({str(c) for c in self.columns["client"]}))

    def of_clients(self, clients: Collection[str]) -> Examples:
        return self.take(np.isin(self.columns["client"], sorted(clients)))

    def by_client(self) -> dict[str, Examples]:
        """client -> its examples, in sorted order of names."""
        names = self.columns["client"]
        order = np.argsort(names, kind="stable")
        unique, starts = np.unique(names[order], return_index=True)
        parts = np.split(order, starts[1:])
        return {str(name): self.take(part) for name, part in zip(unique, parts, strict=True)}


@dataclass(frozen=True)
class ClientData:
    """One client's data; validation examples share no group with the training examples."""

    client: str
    train: Examples
    validation: Examples

    @property
    def num_examples(self) -> int:
        return len(self.train)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The share ``id`` of ``count`` of the clients in a data set (or of the generator's)."""

    id: int
    count: int


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """A device's own folder, in the application's native format."""

    path: Path


DataSource = Partition | LocalData


class RawData(Protocol):
    """A data set as its users hold it, before windows, crops and scaling; each application has its own class."""

    def client_ids(self) -> tuple[str, ...]: ...

    def select(self, clients: Collection[str]) -> Self:
        """Only these clients' data."""
        ...

    def write(self, folder: Path) -> None:
        """In the application's native format, readable by its ``read``; ``folder`` must not exist."""
        ...

    def examples(self, config: Any) -> Examples:
        """Windows, crops and scaling by the torch-free pipeline: the model's inputs, for the application's Config."""
        ...
