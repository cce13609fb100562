"""The examples of several clients, and their batches side by side: the same ones as in the sequential local update."""

from __future__ import annotations

from collections import OrderedDict
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
class Course:
    """All steps of all clients, client by client. rows: (N,) among the examples of the cohort; seeds: (N,) keys of
    augmentation; sizes: of each step; steps: (K,) of each client.
    """

    rows: Integers
    seeds: npt.NDArray[np.uint64] | None
    sizes: Integers
    steps: Integers


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

    def course(self, request: Request, config: Any) -> Course:
        """The same steps as ``batches`` has, in another order."""
        if (self.counts == self.counts[0]).all():
            return self._alike_course(request, config)
        plans = [self._plan(client, request, config) for client in range(len(self))]
        parts = [(order, key, first) for plan, first in zip(plans, self.first, strict=True) for order, key in plan]
        seeds = None
        if self.keyed:
            seeds = np.concatenate([seeding.example_keys(key, order) for order, key, _ in parts])
        return Course(
            np.concatenate([order + first for order, _, first in parts]),
            seeds,
            np.array([len(order) for order, _, _ in parts], np.int64),
            np.array([len(plan) for plan in plans], np.int64),
        )

    def _alike_course(self, request: Request, config: Any) -> Course:
        count, size, seed, number = int(self.counts[0]), self.batch_size, request.seed, request.round
        epochs = config.algorithm.local_epochs
        each = [min(size, count - start) for start in range(0, count, size)] * epochs
        sizes = np.array(each[: request.max_steps or None], np.int64)
        orders = [permutations(order_keys(seed, number, self.names, epoch), count) for epoch in range(epochs)]
        examples, seeds = int(sizes.sum()), None
        if self.keyed:
            keys = [
                np.stack([
                    seeding.example_keys(seeding.key(seed, "augment", number, name, epoch), row)
                    for name, row in zip(self.names, order, strict=True)
                ])
                for epoch, order in enumerate(orders)
            ]  # fmt: skip
            seeds = np.concatenate(keys, axis=1)[:, :examples].reshape(-1)
        rows = (np.concatenate(orders, axis=1) + self.first[:, None])[:, :examples]
        return Course(rows.reshape(-1), seeds, np.tile(sizes, len(self)), np.full(len(self), len(sizes)))

    def take(
        self, batch: Batch, names: Sequence[str], augment: Callable[..., Any] | None, config: Any
    ) -> tuple[list[Tensor], Tensor]:
        """Inputs (K B, ...) in the order of ``names``, and targets (K, B, ...)."""
        inputs, targets = self.rows(batch.rows.reshape(-1), batch.seeds, names, augment, config)
        return inputs, targets.view(*batch.rows.shape, *targets.shape[1:])

    def rows(
        self,
        rows: Integers,
        seeds: npt.NDArray[np.uint64] | None,
        names: Sequence[str],
        augment: Callable[..., Any] | None,
        config: Any,
    ) -> tuple[list[Tensor], Tensor]:
        """These examples, augmented: inputs in the order of ``names``, and targets."""
        index = torch.from_numpy(rows)
        inputs = {name: array.index_select(0, index) for name, array in self.inputs.items()}
        if augment is not None and seeds is not None:
            made = augment({k: v.numpy() for k, v in inputs.items()}, seeds.reshape(-1), config)
            inputs = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in made.items()}
        return [inputs[name] for name in names], self.targets.index_select(0, index)


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


class CohortCache:
    """The cohorts that were asked for more than once, the latest ones, up to ``limit`` bytes of examples.

    Where every client takes part in every round the same ones come together again; where clients are drawn they do not,
    and nothing is kept.
    """

    SEEN = 4096  # hashes of what was asked for once

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[tuple[str, ...], tuple[Cohort, int]] = OrderedDict()

    def get(self, names: tuple[str, ...], make: Callable[[], Cohort]) -> Cohort:
        if names in self._kept:
            self._kept.move_to_end(names)
            return self._kept[names][0]
        cohort, key = make(), hash(names)
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > self.SEEN:
                self._seen.popitem(last=False)
            return cohort
        size = sum(x.numel() * x.element_size() for x in (*cohort.inputs.values(), cohort.targets))
        if size <= self._limit:
            self._kept[names] = cohort, size
            self._used += size
            while self._used > self._limit:
                self._used -= self._kept.popitem(last=False)[1][1]
        return cohort
