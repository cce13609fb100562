"""The workloads of the simulation benchmark as applications: generated data, models that peers can build too.

W1: two convolutions on 28 x 28 (Reddi et al. 2021: EMNIST), 1.2 million parameters, 100 examples a client; W2: the same on
32 x 32 x 3, 50 examples; W3: one-dimensional convolutions on 6 x 128 sensor windows, 30 examples; W3g: a GRU on the same
windows; W4: a perceptron of one hidden layer. All: batches of 10, SGD with learning rate 0.1, one epoch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_core.contracts.config import number, text
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig
from fl_core.learning.application import Application, TensorSpec
from fl_core.learning.examples import Examples

BATCH, RATE = 10, 0.1


@dataclass(frozen=True)
class Workload:
    """clients: in a round; examples: of each; shape: of one input; multiply-adds of one example in a forward pass."""

    name: str
    clients: int
    examples: int
    shape: tuple[int, ...]
    classes: int
    forward_macs: int
    first_macs: int

    @property
    def flops(self) -> float:
        """Of one update in matrix products: forward, both gradients; the first layer needs no input gradient."""
        return 2.0 * self.examples * (3 * self.forward_macs - self.first_macs)


def _cnn(channels: int, side: int, classes: int) -> tuple[int, int]:
    first = (side - 2) ** 2 * 32 * 9 * channels
    flat = ((side - 4) // 2) ** 2 * 64
    return first + (side - 4) ** 2 * 64 * 288 + flat * 128 + 128 * classes, first


WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", 100, 100, (1, 28, 28), 62, *_cnn(1, 28, 62)),
        Workload("W2", 50, 50, (3, 32, 32), 10, *_cnn(3, 32, 10)),
        Workload("W3", 1000, 30, (6, 128), 6, 128 * 960 + 64 * 64 * 160 + 32 * 64 * 192 + 64 * 70, 128 * 960),
        Workload("W3g", 400, 30, (6, 128), 6, 128 * 192 * 70 + 64 * 6, 128 * 192 * 6),
        Workload("W4", 1000, 30, (32,), 6, 32 * 64 + 64 * 6, 32 * 64),
    )
}


class ImageNet2(nn.Module):
    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        flat = ((side - 4) // 2) ** 2 * 64
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3)
        self.hidden, self.head = nn.Linear(flat, 128), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)
        found: Tensor = self.head(torch.relu(self.hidden(x.flatten(1))))
        return found


class SensorNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, 32, 5, padding=2), nn.Conv1d(32, 64, 5, padding=2)
        self.conv3 = nn.Conv1d(64, 64, 3, padding=1)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool1d(torch.relu(self.conv1(x)), 2)
        x = functional.max_pool1d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.conv3(x)).mean(2)
        found: Tensor = self.head(torch.relu(self.hidden(x)))
        return found


class GruNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(6, 64, batch_first=True), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(x.transpose(1, 2))
        found: Tensor = self.head(states[:, -1])
        return found


def make_model(name: str) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    w = WORKLOADS[name]
    if name == "W3":
        return SensorNet(w.classes)
    if name == "W3g":
        return GruNet(w.classes)
    if name == "W4":
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, w.classes))
    return ImageNet2(w.shape[0], w.shape[1], w.classes)


def make_data(name: str, clients: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """x (clients, examples, *shape) float32, y (clients, examples) int64; the same in every process."""
    w, rng = WORKLOADS[name], np.random.default_rng(1)
    x = rng.standard_normal((clients, w.examples, *w.shape), dtype=np.float32) * np.float32(0.5)
    return x, rng.integers(0, w.classes, (clients, w.examples))


# as an application


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    workload: str = text("W4")
    double: int = number(0, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    clients: int = number(1000, low=1, high=10_000_000)
    holdout_fraction: float = number(0.0, low=0.0, high=0.9)
    validation_fraction: float = number(0.0, low=0.0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="sgd", lr=RATE))
    algorithm: AlgorithmConfig = field(default_factory=lambda: AlgorithmConfig(batch_size=BATCH, evaluate_every=0))


@dataclass(frozen=True)
class Generated:
    """The workload's data as an application's raw data."""

    name: str
    chosen: tuple[str, ...]

    def client_ids(self) -> tuple[str, ...]:
        return self.chosen

    def select(self, clients: Collection[str]) -> Self:
        return type(self)(self.name, tuple(c for c in self.chosen if c in set(clients)))

    def write(self, folder: Path) -> None:
        no_data_set(folder)

    def examples(self, config: Any) -> Examples:
        x, y = make_data(self.name, config.data.clients)
        number = np.array([int(c.rpartition("-")[2]) for c in self.chosen])
        x, y = x[number], y[number]
        if config.model.double:
            x = x.astype(np.float64)
        owner = np.repeat(np.array(self.chosen), y.shape[1])
        ids = np.array([f"{c}/{i}" for c in self.chosen for i in range(y.shape[1])])
        columns = {"client": owner, "group": ids, "example_id": ids}
        return Examples({"x": x.reshape(-1, *x.shape[2:])}, y.reshape(-1), columns)


def client_name(number: int) -> str:
    return f"client-{number:07d}"


def generate(config: Config, seed: int) -> Generated:
    return Generated(config.model.workload, tuple(client_name(i) for i in range(config.data.clients)))


def build_model(config: Config) -> nn.Module:
    model = make_model(config.model.workload)
    return model.double() if config.model.double else model


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    value = functional.cross_entropy(outputs, targets, reduction="sum")
    return value, outputs.new_tensor(float(len(outputs)))


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="x", dtype="float32", shape=(-1, *WORKLOADS[config.model.workload].shape)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="logits", dtype="float32", shape=(-1, WORKLOADS[config.model.workload].classes)),)


def no_data_set(*arguments: Any) -> Any:
    raise InputError("a benchmark's application has no data set of its own format", remedy="leave --data out")


APPLICATION = Application(
    name="benchmark",
    title="Benchmark",
    summary="Workloads of the simulation benchmark.",
    config_type=Config,
    data_set="benchmark",
    client_term="client",
    read=no_data_set,
    generate=generate,
    inputs=inputs,
    outputs=outputs,
    postprocess=lambda config, found: dict(found),
    metrics=lambda config, found, examples: {"accuracy": float((found["logits"].argmax(1) == examples.targets).mean())},  # type: ignore[attr-defined]
    groups=lambda config, examples: {},
    labels=lambda config: (),
    primary_metric="accuracy",
    higher_is_better=True,
    model="benchmarks._workloads:build_model",
    loss="benchmarks._workloads:loss",
)


def configured(name: str, clients: int = 0, **model: Any) -> Config:
    count = clients or WORKLOADS[name].clients
    return Config(model=ModelConfig(workload=name, **model), data=DataConfig(clients=count))
