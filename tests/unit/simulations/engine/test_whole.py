"""Whole local updates in one call of the kernels, against the sequential update in float64; and what stays step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_clients.training.client import Learner
from fl_core.algorithms.base import Algorithm, ClientUpdate, GradientTerms, LocalStart, MeanAggregator
from simulations.engine import native
from simulations.engine.native import whole
from simulations.engine.native.whole import NotAChain, chain
from simulations.engine.paths.sequential import SequentialPath
from simulations.engine.paths.stacked import StackedPath
from simulations.engine.program.compiler import Program
from tests.unit.simulations.engine.test_native import needs_compiler
from tests.unit.simulations.engine.test_paths import SIZES, compare, learner, run, tasks

SHAPE = (3, 12)
pytestmark = needs_compiler


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Dropout(0.0), nn.Linear(9, 4, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


class Convolutions(nn.Module):
    def __init__(self, pooled: str) -> None:
        super().__init__()
        self.a, self.b, self.pooled = nn.Conv1d(3, 6, 5, padding=2), nn.Conv1d(6, 5, 3, stride=2, bias=False), pooled
        self.average, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(functional.max_pool1d(torch.relu(self.a(x * 2 - 1)), 3, 2, 1)))
        if self.pooled == "module":
            x = self.average(x).flatten(1)
        elif self.pooled == "squeezed":
            x = self.average(x).squeeze(2)
        else:
            x = x.mean(2) if self.pooled == "mean" else x[:, :, -1]
        found: Tensor = self.head(x)
        return found


class Recurrent(nn.Module):
    """Over time by a linear layer, a recurrent one, and its last state or its mean."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.first = last, nn.Linear(3, 5)
        self.cell, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(torch.relu(self.first(x.transpose(1, 2))))
        found: Tensor = self.head(states[:, -1] if self.last else states.mean(1))
        return found


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        found: Tensor = self.b(x + self.a(x))
        return found


class Curved(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": Perceptron,
    **{f"convolutions, {how}": (lambda how=how: Convolutions(how)) for how in ("mean", "last", "module", "squeezed")},
    "recurrent, last": lambda: Recurrent(True),
    "recurrent, mean": lambda: Recurrent(False),
}
TRAININGS = {
    "plain": (),
    "decay, two epochs": ("optimizer.weight_decay=0.1", "algorithm.local_epochs=2"),
    "proximal": ("algorithm.name=fedprox", "algorithm.proximal_mu=0.5", "optimizer.weight_decay=0.1"),
}


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), outputs.new_tensor(float(len(outputs)))


def plain(make: Callable[[], nn.Module], *overrides: str, augment: bool = False) -> Learner:
    found = learner(make, SHAPE, *overrides, augment=augment)
    return dataclasses.replace(found, application=dataclasses.replace(found.application, loss=f"{__name__}:loss"))


class Counting(StackedPath):
    """How many blocks went in one call."""

    whole = 0

    def at_once(self, *args: Any) -> Any:
        found = super().at_once(*args)
        self.whole += found is not None
        return found


@pytest.mark.parametrize("sizes", [SIZES, (8, 8, 8, 8)], ids=["unlike", "alike"])
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("model", MODELS)
def test_whole_updates_are_the_sequential_ones(model: str, training: str, sizes: tuple[int, ...]) -> None:
    ours = plain(MODELS[model], *TRAININGS[training])
    work = tasks(SHAPE, sizes)
    path = Counting(ours, 3)
    compare(run(path, work, ours), run(SequentialPath(ours), work, ours))
    assert path.whole == 2, "two blocks, of three clients and of one"


@pytest.mark.parametrize("sizes", [SIZES, (8, 8, 8, 8)], ids=["unlike", "alike"])
def test_augmentation_limits_of_steps_and_little_memory(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.engine.paths.stacked.AT_ONCE_BYTES", 1)
    ours, request = plain(Perceptron, "algorithm.local_epochs=3", augment=True), {"max_steps": 5}
    work, path = tasks(SHAPE, sizes), Counting(ours, 4)
    compare(run(path, work, ours, **request), run(SequentialPath(ours), work, ours, **request))
    assert path.whole == 1


class Corrected(ClientUpdate):
    """As SCAFFOLD's, together with a proximal term."""

    def __init__(self, model: nn.Module) -> None:
        rng = np.random.default_rng(3)
        self.correction = tuple(rng.normal(size=tuple(p.shape)) for p in model.parameters())

    def terms(self) -> GradientTerms:
        return GradientTerms(proximal=0.3, correction=self.correction)


class EachCorrected(Corrected):
    def begin(self, start: LocalStart) -> ClientUpdate:
        """A part of its own for each client, so that there is a correction for each, too."""
        return self


@pytest.mark.parametrize("update", [Corrected, EachCorrected])
def test_constant_corrections(update: type[Corrected]) -> None:
    ours = plain(Perceptron)
    changed, work = dataclasses.replace(ours, algorithm=Algorithm(MeanAggregator(), update(ours.model))), tasks(SHAPE)
    path = Counting(changed, 4)
    compare(run(path, work, changed), run(SequentialPath(changed), work, changed))
    assert path.whole == 1


@pytest.mark.parametrize("make", [Skipping, Curved], ids=["skipping", "curved"])
def test_what_is_no_chain_goes_step_by_step(make: Callable[[], nn.Module]) -> None:
    ours, work = plain(make), tasks(SHAPE)
    path = Counting(ours, 4)
    compare(run(path, work, ours), run(SequentialPath(ours), work, ours))
    assert path.whole == 0
    with pytest.raises(NotAChain):
        chain(Program(ours.model), torch.zeros(1, *SHAPE, dtype=torch.float64), 4)


@pytest.mark.parametrize("overrides", [("optimizer.momentum=0.5",), ("optimizer.clip_norm=0.1",)])
def test_other_training_goes_step_by_step(overrides: tuple[str, ...]) -> None:
    ours, work = plain(Perceptron, *overrides), tasks(SHAPE)
    path = Counting(ours, 4)
    compare(run(path, work, ours), run(SequentialPath(ours), work, ours))
    assert path.whole == 0


def test_large_matrices_stay_with_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LARGEST", 100)
    ours, work = plain(Perceptron), tasks(SHAPE)
    path = Counting(ours, 4)
    compare(run(path, work, ours), run(SequentialPath(ours), work, ours))
    assert path.whole == 0


def test_kinds_are_numbered_as_in_the_source() -> None:
    source = (Path(native.__file__).parent / "kernels.c").read_text()
    kinds = source.partition("enum { ")[2].partition(" };")[0].split(", ")
    assert [getattr(whole, kind) for kind in kinds] == list(range(len(kinds)))
    assert (source.partition("KIND,")[2].partition("SIZES")[0].count(",") + 1 + 8) == whole.FIELDS
