"""The sequential local update: plain loops over epochs and batches. Every faster path is held to this one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fl_core.algorithms.base import ClientUpdate
from fl_core.contracts.arrays import Arrays
from fl_core.learning import seeding
from fl_core.learning.application import Application
from fl_core.learning.augmentation import Augmentation
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import get_arrays, prediction_batch, set_arrays, tensors
from fl_core.optimizers import build_optimizer


@dataclass(frozen=True)
class LocalResult:
    """arrays: the client's model. loss: the mean training loss over all examples seen. steps: of the optimiser."""

    arrays: dict[str, npt.NDArray[Any]]
    num_examples: int
    loss: float
    steps: int = 0


def client_learning_rate(config: Any, round: int, num_rounds: int) -> float:
    """``algorithm.client_lr`` (or ``optimizer.lr``), constant or by a cosine over the rounds (Loshchilov & Hutter 2017)."""
    lr: float = config.algorithm.client_lr or config.optimizer.lr
    if config.algorithm.schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * (round - 1) / max(1, num_rounds)))
    return lr


def batches(count: int, batch_size: int, *key: int | str) -> list[npt.NDArray[np.int64]]:
    """A permutation of ``count`` examples cut into batches; the last one is smaller, none is dropped."""
    order = seeding.generator(*key).permutation(count)
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def local_update(
    model: nn.Module,
    application: Application,
    config: Any,
    data: Examples,
    *,
    reference: Arrays,
    client_update: ClientUpdate,
    client: str,
    round: int,
    num_rounds: int,
    seed: int,
    max_steps: int = 0,
    expired: Callable[[], bool] = lambda: False,
) -> LocalResult:
    """Train ``model`` from ``reference`` on ``data``; the optimiser starts afresh each round.

    max_steps: at most so many (0 = all of ``local_epochs``). expired(): no time is left for another step; the first
    one is done in any case.

    Randomness is keyed by (seed, round, client), so that the result does not depend on where or when it runs.
    """
    set_arrays(model, reference, origin="global model")
    if len(data) == 0:
        return LocalResult(get_arrays(model), 0, 0.0)
    if client_update.frozen:
        client_update.observe(model.eval(), _as_they_are(application, config, data))
        return LocalResult(get_arrays(model), len(data), 0.0, steps=1)
    client_update.prepare(data.targets)
    loss_function, augment = application.loss_function(), application.augment_function()
    parameters = [p for p in model.parameters() if p.requires_grad]
    origin = [p.detach().clone() for p in parameters]
    optimizer = build_optimizer(model, replace(config.optimizer, lr=client_learning_rate(config, round, num_rounds)))
    torch.manual_seed(seeding.key(seed, "dropout", round, client))
    model.train()
    total, weight, steps = 0.0, 0.0, 0
    for epoch, index in schedule(config, len(data), seed=seed, round=round, client=client, max_steps=max_steps):
        if steps and expired():
            break
        batch = augmented(data.take(index), index, seeding.key(seed, "augment", round, client, epoch), config, augment)
        targets = torch.from_numpy(np.ascontiguousarray(batch.targets))
        optimizer.zero_grad(set_to_none=True)
        outputs = client_update.restrict(model(*tensors(application, config, batch)))
        numerator, denominator = loss_function(outputs, targets, config)
        (numerator / denominator).backward()
        client_update.adjust_gradients(parameters, origin)
        if config.optimizer.clip_norm > 0:
            nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        optimizer.step()
        steps += 1
        total += float(numerator.detach())
        weight += float(denominator.detach())
    return LocalResult(get_arrays(model), len(data), total / weight if weight else 0.0, steps)


def _as_they_are(
    application: Application, config: Any, data: Examples
) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    size = prediction_batch(data)
    with torch.inference_mode():
        for start in range(0, len(data), size):
            part = data.take(slice(start, start + size))
            yield tensors(application, config, part), torch.from_numpy(np.ascontiguousarray(part.targets))


def schedule(
    config: Any, count: int, *, seed: int, round: int, client: str, max_steps: int = 0
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(epoch, indices of the batch) of each step of one client's local update; at most ``max_steps`` (0 = all)."""
    steps = 0
    for epoch in range(config.algorithm.local_epochs):
        for index in batches(count, config.algorithm.batch_size, seed, "order", round, client, epoch):
            yield epoch, index
            steps += 1
            if steps == max_steps:
                return


def augmented(
    batch: Examples, index: npt.NDArray[np.int64], base: int, config: Any, augment: Callable[..., Any] | None
) -> Examples:
    """Augmentation keyed by example, never by worker or position in the batch."""
    if augment is None:
        return batch
    keys = seeding.example_keys(base, np.asarray(index))
    inputs = augment(batch.inputs, keys, config)
    if isinstance(augment, Augmentation):
        return replace(batch, inputs=inputs, targets=augment.targets(batch.targets, keys, config))
    return replace(batch, inputs=inputs)
