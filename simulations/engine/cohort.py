"""The examples of several clients, and their batches side by side: the same ones as in the sequential local update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_core.flower.messages import Request
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from fl_core.learning.local_update import schedule
from simulations.engine.orders import order_keys, permutations

Integers = npt.NDArray[np.int64]


@dataclass
class Batch:
    """One step of the clients that still have one. rows: (K, B) among all examples of the cohort; seeds: (K, B) keys of
    augmentation; sizes: (K,) how many of the B are the client's batch, the rest only fills up.
    """

    rows: Integers
    seeds: npt.NDArray[np.uint64] | None
    sizes: Integers


@dataclass
class Cohort:
    """positions: of the clients in the order that they were given, those with most steps first."""

    names: list[str]
    positions: list[int]
    inputs: dict[str, Tensor]
    targets: Tensor
    counts: Integers
    first: Integers
    batch_size: int
    keyed: bool = True  # whether anything is augmented

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, request: Request, config: Any) -> Iterator[Batch]:
        """All steps; a client whose epoch ends goes on with its next one, and drops out of the stack when it is done."""
        return self._alike(request, config) if (self.counts == self.counts[0]).all() else self._unlike(request, config)

    def _alike(self, request: Request, config: Any) -> Iterator[Batch]:
        """Clients of one size, all orders drawn together."""
        count, size, seed, number, done = int(self.counts[0]), self.batch_size, request.seed, request.round, 0
        for epoch in range(config.algorithm.local_epochs):
            orders = permutations(order_keys(seed, number, self.names, epoch), count)
            base = [seeding.key(seed, "augment", number, name, epoch) for name in self.names] if self.keyed else []
            for start in range(0, count, size):
                if request.max_steps and done == request.max_steps:
                    return
                done += 1
                index = orders[:, start : start + size]
                keys = (
                    np.stack([seeding.example_keys(k, row) for k, row in zip(base, index, strict=True)])
                    if base
                    else None
                )
                yield Batch(index + self.first[:, None], keys, np.full(len(self), index.shape[1]))

    def _unlike(self, request: Request, config: Any) -> Iterator[Batch]:
        plans = [self._plan(client, request, config) for client in range(len(self))]
        for step in range(len(plans[0])):
            parts = [plan[step] for plan in plans if len(plan) > step]
            sizes = np.array([len(order) for order, _ in parts])
            index = np.zeros((len(parts), int(sizes.max())), np.int64)
            for row, (order, _) in zip(index, parts, strict=True):
                row[: len(order)] = order
            keys = None
            if self.keyed:
                keys = np.stack([seeding.example_keys(key, row) for (_, key), row in zip(parts, index, strict=True)])
            yield Batch(index + self.first[: len(parts), None], keys, sizes)

    def _plan(self, client: int, request: Request, config: Any) -> list[tuple[Integers, int]]:
        """(order of examples, key of augmentation) of each step of one client, as the sequential local update draws them."""
        seed, number, name = request.seed, request.round, self.names[client]
        keys: dict[int, int] = {}
        found = []
        for epoch, order in schedule(
            config, int(self.counts[client]), seed=seed, round=number, client=name, max_steps=request.max_steps
        ):
            if epoch not in keys:
                keys[epoch] = seeding.key(seed, "augment", number, name, epoch) if self.keyed else 0
            found.append((order, keys[epoch]))
        return found

    def take(
        self, batch: Batch, names: Sequence[str], augment: Callable[..., Any] | None, config: Any
    ) -> tuple[list[Tensor], Tensor]:
        """Inputs (K B, ...) in the order of ``names``, and targets (K, B, ...)."""
        rows = torch.from_numpy(batch.rows.reshape(-1))
        inputs = {name: array.index_select(0, rows) for name, array in self.inputs.items()}
        if augment is not None and batch.seeds is not None:
            made = augment({k: v.numpy() for k, v in inputs.items()}, batch.seeds.reshape(-1), config)
            inputs = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in made.items()}
        targets = self.targets.index_select(0, rows)
        return [inputs[name] for name in names], targets.view(*batch.rows.shape, *targets.shape[1:])


def gathered(names: Sequence[str], parts: Sequence[Examples], batch_size: int, *, keyed: bool = True) -> Cohort:
    """Raises ValueError for a client without examples, and for clients whose examples have different shapes."""
    counts = np.array([len(part) for part in parts])
    if not counts.all():
        raise ValueError("a client has no examples")
    order = np.argsort(-np.ceil(counts / batch_size), kind="stable")
    chosen = [parts[i] for i in order]
    inputs = {
        name: torch.from_numpy(np.ascontiguousarray(np.concatenate([part.inputs[name] for part in chosen])))
        for name in chosen[0].inputs
    }
    targets = torch.from_numpy(np.concatenate([part.targets for part in chosen]))
    ends = np.cumsum(counts[order])
    return Cohort(
        [names[i] for i in order],
        order.tolist(),
        inputs,
        targets,
        counts[order],
        ends - counts[order],
        batch_size,
        keyed,
    )
