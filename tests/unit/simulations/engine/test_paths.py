"""Every fast path against the sequential local update, in float64: same batches, same arithmetic, up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_clients.training.client import Learner
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Algorithm, ClientUpdate, GradientTerms, MeanAggregator
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.config import to_table
from fl_core.flower.messages import Request
from fl_core.learning.application import TensorSpec, application
from fl_core.learning.examples import ClientData, Examples
from fl_core.learning.torch_arrays import get_arrays
from simulations.engine import native
from simulations.engine.measure import deviation
from simulations.engine.paths import Path, Results, Task
from simulations.engine.paths.functional import FunctionalPath
from simulations.engine.paths.sequential import SequentialPath
from simulations.engine.paths.stacked import StackedPath
from simulations.engine.program.compiler import UnsupportedModel
from simulations.simulate import simulate
from tests.helpers import small_config

SIZES = (7, 16, 3, 11)  # examples of the clients: batches of 4, so last ones of every size
EPS = 1e-10
STARTS: dict[int, dict[str, Any]] = {}


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 5, padding=2, stride=2), nn.Conv1d(6, 6, 3, padding=2, dilation=2)
        self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool1d(torch.relu(self.a(x)), 2)
        y = x + self.norm(self.b(x))
        y = torch.relu(y)
        found: Tensor = self.head(torch.cat([y.mean(dim=2), y.amax(dim=2)], dim=1))
        return found


class Conv2dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1, stride=(1, 2)), nn.Conv2d(4, 6, 3, bias=False)
        self.c = nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.pool, self.act, self.head = nn.MaxPool2d(2), nn.ReLU(), nn.Linear(6 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(functional.gelu(self.a(x))))
        x = self.pool(self.act(self.c(x)))
        found: Tensor = self.head(x.flatten(1))
        return found


class GruNet(nn.Module):
    def __init__(self, every_state: bool, hidden: int) -> None:
        super().__init__()
        self.every_state = every_state
        self.first, self.cell, self.head = nn.Linear(3, 5), nn.GRU(5, hidden, batch_first=True), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(torch.tanh(self.first(x.transpose(1, 2))))
        found: Tensor = self.head(states.mean(1) if self.every_state else states[:, -1])
        return found


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


class Dropping(nn.Module):
    """Random after flat and after temporal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(3, 5, 3), nn.Linear(40, 8), nn.Linear(8, 4)
        self.first, self.second = nn.Dropout(0.3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.relu(self.a(x))).flatten(1)
        found: Tensor = self.head(self.second(torch.tanh(self.b(x))))
        return found


class LstmNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.Parameter(torch.full((3,), 0.3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.softmax(x.transpose(1, 2) * self.attention, 2).mean(1))
        return found


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (Conv1dNet, (3, 20)),
    "conv2d": (Conv2dNet, (2, 8, 9)),
    "gru_last": (partial(GruNet, False, 8), (3, 10)),  # of whole vectors: by the kernels
    "gru_all": (partial(GruNet, True, 6), (3, 10)),
    "mlp": (Mlp, (3, 10)),
    "dropout": (Dropping, (3, 10)),
}
TRAININGS = {
    "plain": (),
    "decay": ("optimizer.weight_decay=0.1",),
    "momentum, two epochs": ("optimizer.momentum=0.9", "optimizer.weight_decay=0.1", "algorithm.local_epochs=2"),
    "proximal, clipped": ("algorithm.name=fedprox", "algorithm.proximal_mu=0.5", "optimizer.clip_norm=0.3"),
    "adamw, two epochs": ("optimizer.name=adamw", "optimizer.weight_decay=0.1", "algorithm.local_epochs=2"),
}


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    weight = 1.0 + targets.to(outputs.dtype)
    return (functional.cross_entropy(outputs, targets, reduction="none") * weight).sum(), weight.sum()


def noisy(inputs: dict[str, Any], seeds: Any, config: Any) -> dict[str, Any]:
    from fl_core.learning.seeding import uniform

    x = inputs["x"]
    return {"x": x + uniform(seeds, 1).reshape(-1, *(1 for _ in x.shape[1:]))}


class CorrectedUpdate(ClientUpdate):
    """As SCAFFOLD: a constant beside each gradient."""

    def __init__(self, model: nn.Module) -> None:
        rng = np.random.default_rng(5)
        self.correction = tuple(rng.normal(size=tuple(p.shape)) for p in model.parameters())

    def terms(self) -> GradientTerms:
        return GradientTerms(correction=self.correction)


def learner(make: Callable[[], nn.Module], shape: tuple[int, ...], *overrides: str, augment: bool = True) -> Learner:
    STARTS.clear()
    torch.manual_seed(1)
    app = dataclasses.replace(
        application("toy_regression"),
        loss=f"{__name__}:loss",
        augment=f"{__name__}:noisy" if augment else "",
        inputs=lambda config: (TensorSpec(name="x", dtype="float64", shape=(-1, *shape)),),
    )
    config = app.configure(["algorithm.batch_size=4", "optimizer.lr=0.2", *overrides])
    return Learner(app, config, make().double(), build_algorithm(config.algorithm))


def tasks(shape: tuple[int, ...], sizes: tuple[int, ...] = SIZES) -> list[Task]:
    rng, found = np.random.default_rng(3), []
    for number, size in enumerate(sizes):
        train = Examples({"x": rng.normal(size=(size, *shape))}, rng.integers(0, 4, size))
        data = ClientData(f"c{number}", train, train.take(slice(0, 0)))
        found.append(Task(f"c{number}", partial(lambda data: data, data)))
    return found


def run(path: Path, work: list[Task], ours: Learner, **options: Any) -> dict[int, tuple[dict[str, Any], int, float]]:
    """From the weights that the model had when it was first run."""
    start = STARTS.setdefault(id(ours.model), get_arrays(ours.model))
    request = Request(
        application="toy_regression",
        config=to_table(ours.config),
        round=2,
        num_rounds=3,
        seed=7,
        arrays=start,
        **options,
    )
    found: dict[int, tuple[dict[str, Any], int, float]] = {}
    for one in path.train(work, request):
        assert not one.failures
        for i, position in enumerate(one.positions):
            arrays = {name: np.array(array[i]) for name, array in one.arrays.items()}
            found[position] = arrays, one.num_examples[i], one.metrics[i]["loss"]
    return found


def compare(found: dict[int, Any], expected: dict[int, Any], tolerance: float = EPS) -> None:
    assert found.keys() == expected.keys()
    for position, (arrays, examples, mean_loss) in expected.items():
        assert found[position][1] == examples
        assert found[position][2] == pytest.approx(mean_loss, abs=tolerance)
        assert sorted(found[position][0]) == sorted(arrays)
        for name, array in arrays.items():
            np.testing.assert_allclose(found[position][0][name], array, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that gives up and does its block one by one would pass any comparison."""

    def refuse(self: SequentialPath, tasks: Any, request: Any) -> Any:
        raise AssertionError("the fast path gave up")

    for kind in (StackedPath, FunctionalPath):
        made = kind.__init__

        def init(self: Any, *args: Any, made: Any = made) -> None:
            made(self, *args)
            self._slow = type("Refusing", (), {"train": refuse})()

        monkeypatch.setattr(kind, "__init__", init)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("model", SHAPES)
def test_compiled_paths_are_the_sequential_update(model: str, training: str) -> None:
    make, shape = SHAPES[model]
    ours = learner(make, shape, *TRAININGS[training])
    work = tasks(shape)
    expected = run(SequentialPath(ours), work, ours)
    for clients in (1, 3, 4):
        compare(run(StackedPath(ours, clients), work, ours), expected)


@pytest.mark.parametrize("model", SHAPES)
def test_without_kernels_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    make, shape = SHAPES[model]
    ours = learner(make, shape)
    compare(run(StackedPath(ours, 3), tasks(shape), ours), run(SequentialPath(ours), tasks(shape), ours))


@pytest.mark.parametrize("training", ["plain", "adamw, two epochs", "proximal, clipped"])
@pytest.mark.parametrize("model", ["mlp", "conv1d", "parameter"])
def test_functional_path_is_the_sequential_update(model: str, training: str) -> None:
    make, shape = SHAPES.get(model, (LstmNet, (3, 10)))
    ours = learner(make, shape, *TRAININGS[training])
    expected = run(SequentialPath(ours), tasks(shape), ours)
    compare(run(FunctionalPath(ours, 3), tasks(shape), ours), expected)


@pytest.mark.parametrize("model", ["mlp", "conv2d"])
def test_a_constant_correction_is_added(model: str) -> None:
    make, shape = SHAPES[model]
    plain = learner(make, shape, augment=False)
    ours = dataclasses.replace(plain, algorithm=Algorithm(MeanAggregator(), CorrectedUpdate(plain.model)))
    work = tasks(shape)
    expected = run(SequentialPath(ours), work, ours)
    other = run(SequentialPath(plain), work, plain)
    assert any(not np.allclose(expected[0][0][n], other[0][0][n]) for n in other[0][0])
    compare(run(StackedPath(ours, 4), work, ours), expected)


def exact(inputs: dict[str, Any], seeds: Any, config: Any) -> dict[str, Any]:
    """The application's augmentation, with float64 where it gives float32."""
    made = application("driver_conflict").augment_function()(inputs, seeds, config)  # type: ignore[misc]
    return {name: value.astype(np.float64) for name, value in made.items()}


@pytest.mark.parametrize("name", ["driver_conflict", "plant_disease"])
def test_the_applications_compile_and_agree(name: str) -> None:
    app, config = small_config(name)
    if name == "driver_conflict":
        app = dataclasses.replace(app, augment=f"{__name__}:exact")
    ours = Learner(app, config, app.build_model(config).double(), build_algorithm(config.algorithm))
    by_client = app.generate(config, 0).examples(config).by_client()
    work = [Task(c, partial(lambda d: d, ClientData(c, e, e.take(slice(0, 0))))) for c, e in by_client.items()][:3]
    expected = run(SequentialPath(ours), work, ours)
    for clients in (1, 3):
        compare(run(StackedPath(ours, clients), work, ours), expected)


def test_what_a_program_cannot_do_is_refused_with_its_reason() -> None:
    class DroppingBare(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(super().forward(x), 0.5)

    class Tied(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.body[3](self.body(x)))
            return found

    class Branching(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    batch_norm = lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(30), nn.Linear(30, 4))  # noqa: E731
    for make, why in (
        (DroppingBare, "random"), (Tied, "used more than once"), (Branching, "cannot be traced"),
        (LstmNet, "outside a layer"), (batch_norm, "BatchNorm1d has no backward pass"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModel, match=why):
            StackedPath(learner(make, (3, 10)), 2)


def test_results_that_deviate_are_noticed() -> None:
    one = Results([0], {"w": np.array([[2.0, 2.0]])}, [1], [{}])
    request = Request(application="", config={}, round=1, num_rounds=1, seed=0, arrays={"w": np.array([1.0, 1.0])})
    assert deviation([one], [one], request) == ""
    other = Results([0], {"w": np.array([[2.0, 1.5]])}, [1], [{}])
    assert "differs by 35.4%" in deviation([other], [one], request)


@pytest.mark.parametrize(
    ("algorithm", "personal"),
    [("scaffold", ""), ("fednova", "head.*"), ("feddyn", ""), ("feddyn", "head.*"), ("fedprox", "head.*")],
)
def test_algorithms_with_a_part_of_their_own_on_each_client(tmp_path: FilePath, algorithm: str, personal: str) -> None:
    """Three rounds: what clients keep, their own layers too, goes from each into the next; in float32, so up to ReLU ties."""
    app, config = small_config(
        "toy_regression", "data.clients=6", "model.hidden=8", "optimizer.lr=0.01", f"algorithm.name={algorithm}", "algorithm.batch_size=3",
        "algorithm.feddyn_alpha=1.0", "algorithm.proximal_mu=1.0",
        f"algorithm.personal={[personal] if personal else []}", "data.holdout_fraction=0.0",
    )  # fmt: skip
    raw, found = app.generate(config, 0), {}
    for engine in ("sequential", "stacked:4"):
        out = tmp_path / engine.partition(":")[0]
        result = simulate(app, config, raw, start=None, num_rounds=3, seed=0, out=out, workers=1, engine=engine)
        assert result.engine.startswith(engine)
        found[engine] = checkpoints.load(result.final).arrays, result.history
    start = get_arrays(app.build_model(config))
    for name, array in found["sequential"][0].items():
        assert personal or np.abs(array - start[name]).max() > 0.01, "what is compared has changed by much more"
        np.testing.assert_allclose(found["stacked:4"][0][name], array, rtol=0, atol=5e-3, err_msg=name)
    for one, other in zip(found["stacked:4"][1], found["sequential"][1], strict=True):
        assert one.num_examples == other.num_examples
        assert one.loss == pytest.approx(other.loss, abs=1e-3)
        assert one.evaluation["mean_squared_error"] == pytest.approx(other.evaluation["mean_squared_error"], rel=1e-2)
