"""Synthetic(alpha, beta) (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, section 5.1) and its
softmax regression as an Application, with a local update in numpy for the project's own round engine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Message, MessageType
from torch import Tensor, nn

from benchmarks._workloads import no_data_set
from fl_clients.training.local_round import LocalRound
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Algorithm, GradientTerms
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig
from fl_core.flower.messages import Reply, Request
from fl_core.learning import seeding
from fl_core.learning.application import Application, TensorSpec
from fl_core.learning.client_states import ClientStates
from fl_core.learning.examples import Examples
from fl_core.learning.local_update import LocalResult, schedule
from fl_server.selection import select
from simulations.engine import native
from simulations.engine.native.whole import FIELDS, LINEAR, NONE, Chain, train
from simulations.virtual.fleet import Device, DeviceClass
from simulations.virtual.grid import Work

CLIENTS, FEATURES, CLASSES, PER_ROUND = 30, 60, 10, 10
PARAMETERS = ("weight", "bias")
DEADLINE_S = 1.0
Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Client:
    """x: (N, 60), y: (N,) labels; the first ``train`` of them are trained on, the others scored."""

    x: Float
    y: npt.NDArray[np.int64]
    train: int


def generate(alpha: float, beta: float, draw: int, *, iid: bool = False) -> dict[str, Client]:
    """u_k ~ N(0, alpha), B_k ~ N(0, beta) (standard deviations); v_k ~ N(B_k, 1); x ~ N(v_k, diag(j^-1.2));
    y = argmax(x W_k + b_k) with W_k, b_k ~ N(u_k, 1). ``iid``: one W and b ~ N(0, 1) for all, v = 0.
    """
    rng = seeding.generator("synthetic", draw, "iid" if iid else "skewed")
    sizes = rng.lognormal(4, 2, CLIENTS).astype(int) + 50
    u, b = rng.normal(0, alpha, CLIENTS), rng.normal(0, beta, CLIENTS)
    scale = np.arange(1, FEATURES + 1) ** -0.6  # the square root of j^-1.2
    shared = rng.normal(0, 1, (FEATURES + 1, CLASSES))
    found = {}
    for k, size in enumerate(sizes):
        centre = np.zeros(FEATURES) if iid else rng.normal(b[k], 1, FEATURES)
        truth = shared if iid else rng.normal(u[k], 1, (FEATURES + 1, CLASSES))
        x = centre + scale * rng.normal(0, 1, (size, FEATURES))
        found[f"client-{k:02d}"] = Client(x, np.argmax(x @ truth[:-1] + truth[-1], axis=1), int(0.9 * size))
    return found


# The application


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    holdout_fraction: float = 0.0
    validation_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)


def build_model(config: Any) -> nn.Module:
    layer = nn.Linear(FEATURES, CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def loss(outputs: Tensor, targets: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and their number."""
    return nn.functional.cross_entropy(outputs, targets, reduction="sum"), outputs.new_tensor(float(len(targets)))


APPLICATION = Application(
    name="synthetic",
    title="Synthetic(alpha, beta)",
    summary="Softmax regression on clients that differ in model and in data.",
    config_type=Config,
    data_set="synthetic",
    client_term="client",
    read=no_data_set,
    generate=no_data_set,
    inputs=lambda config: (TensorSpec(name="x", dtype="float32", shape=(-1, FEATURES)),),
    outputs=lambda config: (TensorSpec(name="logits", dtype="float32", shape=(-1, CLASSES)),),
    postprocess=lambda config, outputs: {},
    metrics=lambda config, outputs, examples: {},
    groups=lambda config, examples: {},
    labels=lambda config: (),
    primary_metric="accuracy",
    higher_is_better=True,
    model="benchmarks._synthetic:build_model",
    loss="benchmarks._synthetic:loss",
)


def examples(client: Client) -> Examples:
    """Of its training part, as the sequential local update takes them."""
    return Examples({"x": client.x[: client.train].astype(np.float32)}, client.y[: client.train])


# Clients


@functools.cache
def algorithm_of(config: AlgorithmConfig) -> Algorithm:
    """The same for all clients; building one looks through all that is installed."""
    return build_algorithm(config)


class SoftmaxClient:
    """Answers the round engine's messages: the project's algorithms around a local update in numpy."""

    def __init__(self, name: str, data: Client, config: Any, states: ClientStates) -> None:
        self.name, self.data, self.config, self.states = name, data, config, states
        self._algorithm = algorithm_of(config.algorithm)
        self._x = np.hstack([data.x[: data.train], np.ones((data.train, 1))])
        self._truth = np.eye(CLASSES)[data.y[: data.train]]

    def handle(self, message: Message) -> Message:
        request = Request.from_record(message.content, origin=self.name)
        if message.metadata.message_type != MessageType.TRAIN:  # the benchmark scores all clients at once
            return Message(Reply(num_examples=0, metrics={}).to_record(), reply_to=message)
        local = LocalRound(self.name, request, self.config, self._algorithm, PARAMETERS, self.states)
        terms = local.update.terms()
        assert terms is not None
        result = self.train(local.reference, terms, request)
        return Message(local.reply(result).to_record(), reply_to=message)

    def train(self, reference: Arrays, terms: GradientTerms, request: Request) -> LocalResult:
        """SGD on the cross-entropy, the same batches as the sequential local update; float64 inside."""
        start = np.vstack([np.asarray(reference["weight"], np.float64).T, np.asarray(reference["bias"], np.float64)])
        fixed = np.vstack([terms.correction[0].T, terms.correction[1]]) if terms.correction else None
        if (quick := self._compiled(start, terms.proximal, fixed, request)) is not None:
            w, steps = quick
            return LocalResult(_split(w), self.data.train, 0.0, steps)
        with np.errstate(over="ignore", invalid="ignore"):
            w, steps = self._descend(start, terms.proximal, fixed, request, stable=False)
        if not np.isfinite(w).all():  # an exponential overflowed: once more, with the largest logit taken off
            w, steps = self._descend(start, terms.proximal, fixed, request, stable=True)
        return LocalResult(_split(w), self.data.train, 0.0, steps)

    def _compiled(self, start: Float, mu: float, fixed: Float | None, request: Request) -> tuple[Float, int] | None:
        """The same by the simulation engine's kernels, several times faster; None without them."""
        if native.kernels() is None:
            return None
        plan = [
            index
            for _, index in schedule(
                self.config, self.data.train, seed=request.seed, round=request.round, client=self.name,
                max_steps=request.max_steps,
            )
        ]  # fmt: skip
        rows, lr = np.concatenate(plan), self.config.optimizer.lr
        values = torch.from_numpy(start.copy()).view(1, -1)
        offset = torch.from_numpy(lr * mu * start - (0.0 if fixed is None else lr * fixed)).reshape(1, -1)
        largest, inputs = max(map(len, plan)), FEATURES + 1
        chain = Chain([], "", False, inputs, CLASSES, *softmax_operations(inputs, CLASSES, largest))
        train(
            chain, values, 0, torch.from_numpy(self._x[rows]), torch.from_numpy(self.data.y[rows].astype(np.int64)),
            np.array([len(index) for index in plan], np.int64), np.array([len(plan)], np.int64),
            np.arange(largest + 1, dtype=np.float64), None, offset, lr, 1 - lr * mu,
        )  # fmt: skip
        return values.numpy().reshape(start.shape), len(plan)

    def _descend(
        self, start: Float, mu: float, fixed: Float | None, request: Request, *, stable: bool
    ) -> tuple[Float, int]:
        """(weights and bias, steps done)."""
        w, lr, steps, ones = start.copy(), self.config.optimizer.lr, 0, np.ones((CLASSES, CLASSES))
        order = schedule(
            self.config, self.data.train, seed=request.seed, round=request.round, client=self.name,
            max_steps=request.max_steps,
        )  # fmt: skip
        matmul, exp = np.matmul, np.exp
        for _, index in order:
            x = self._x[index]
            p = matmul(x, w)
            if stable:
                p -= p.max(axis=1, keepdims=True)
            exp(p, p)
            p /= matmul(p, ones)  # the sums of the rows
            p -= self._truth[index]
            p *= lr / len(index)
            change = matmul(x.T, p)
            if mu:
                change += (lr * mu) * (w - start)
            if fixed is not None:
                change += lr * fixed
            w -= change
            steps += 1
        return w, steps


def _split(w: Float) -> Arrays:
    return {"weight": w[:-1].T.astype(np.float32), "bias": w[-1].astype(np.float32)}


def softmax_operations(inputs: int, classes: int, batch: int) -> tuple[npt.NDArray[np.int64], int, int, int]:
    """One linear layer without bias for the kernels: (operations, room, place of its outputs, of their gradients)."""
    room = -(-classes * batch // 8) * 8
    operation = [LINEAR, NONE, 0, 0, NONE, room, 0, NONE, NONE, NONE, 1, inputs, classes]
    return np.array([operation + [0] * (FIELDS - len(operation))], np.int64), 2 * room, 0, room


class Scorer:
    """Over all clients: accuracy on the scored parts, and the mean cross-entropy on the training parts."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        parts = clients.values()
        self._train = np.concatenate([c.x[: c.train] for c in parts]), np.concatenate([c.y[: c.train] for c in parts])
        self._test = np.concatenate([c.x[c.train :] for c in parts]), np.concatenate([c.y[c.train :] for c in parts])

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        w, b = (np.asarray(arrays[n], np.float64) for n in PARAMETERS)
        x, y = self._test
        accuracy = float(np.mean(np.argmax(x @ w.T + b, axis=1) == y))
        x, y = self._train
        logits = x @ w.T + b
        logits -= logits.max(axis=1, keepdims=True)
        cost = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
        return {"accuracy": accuracy, "loss": float(cost.mean())}


class Stragglers:
    """A Fleet: whatever its data, a device does all its epochs just within the deadline, except that of each round's
    clients exactly ``share`` have time for 1 to epochs - 1 epochs only, uniformly.
    """

    def __init__(self, work: Mapping[str, Work], share: float, seed: int) -> None:
        self._work, self._share, self._seed = work, share, seed

    def device(self, name: str) -> Device:
        work = self._work[name]
        speed = 1.001 * work.steps * work.batch_size / DEADLINE_S
        kind = DeviceClass(name="all", latency_s=0.0)
        return Device(kind=kind, examples_per_second=speed, down_bytes_s=1e30, up_bytes_s=1e30)

    def pace(self, name: str, round: int) -> float:
        chosen = select(tuple(self._work), PER_ROUND, seed=self._seed, round=round)
        slow = round_half_up(self._share * len(chosen))
        rng = seeding.generator(self._seed, "stragglers", round)
        order = [chosen[i] for i in rng.permutation(len(chosen))]
        epochs = self._work[name].epochs
        paces = dict(zip(order, rng.integers(1, epochs, len(order)) / epochs, strict=True))
        return float(paces[name]) if name in order[:slow] else 1.0

    def drops_out(self, name: str, exchange: str) -> bool:
        return False


def round_half_up(value: float) -> int:
    return int(value + 0.5)
