"""SCAFFOLD, FedNova, FedDyn, FedBuff and FedAsync against their papers, by hand on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_clients.training.local_round import SharedOnly
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Aggregator, ClientUpdate, LocalStart, LocalWork, Update
from fl_core.algorithms.fednova import effective_steps
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig
from fl_server.history import RoundRecord
from simulations.simulate import simulate
from tests.helpers import small_config

LR, NAMES = 0.1, ("a", "b", "c")
TARGETS = {"a": 1.0, "b": -2.0, "c": 5.0}  # client's loss: curvature / 2 (w - target)^2
CURVATURES = {"a": 1.0, "b": 3.0, "c": 0.5}


def algorithm(name: str, **settings: Any) -> Any:
    return build_algorithm(AlgorithmConfig(name=name, **settings))


def descend(
    update: ClientUpdate, client: str, start: float, steps: int, *, lr: float = LR, momentum: float = 0.0
) -> float:
    """Plain SGD on the client's quadratic, through ``adjust_gradients``, as the sequential local update runs it."""
    w = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    for _ in range(steps):
        w.grad = CURVATURES[client] * (w.detach() - TARGETS[client])
        update.adjust_gradients([w], [torch.tensor([start], dtype=torch.float64)])
        optimizer.step()
    return float(w.detach())


class Federation:
    """Rounds of one algorithm over the scalar clients, each with its own number of steps and of examples."""

    def __init__(self, name: str, *, steps: dict[str, int], examples: dict[str, int], **settings: Any) -> None:
        self.algorithm, self.steps, self.examples = algorithm(name, **settings), steps, examples
        self.aggregator: Aggregator = self.algorithm.aggregator
        self.aggregator.population = len(NAMES)
        self.x, self.states = {"w": np.array([0.5])}, dict[str, Arrays]()

    def round(self, number: int, names: tuple[str, ...]) -> float:
        sent = self.aggregator.outgoing(self.x)
        state = self.aggregator.begin(number, self.x)
        for client in names:
            start = LocalStart(parameters=("w",), reference=self.x, extra=sent, state=self.states.get(client, {}))
            update = self.algorithm.client_update.begin(start)
            y = descend(update, client, float(self.x["w"][0]), self.steps[client])
            work = LocalWork(
                arrays={"w": np.array([y])}, num_examples=self.examples[client], steps=self.steps[client], lr=LR
            )
            end = update.finish(work)
            self.states[client] = end.state
            self.aggregator.screen(end.extra, self.x, origin=client)
            self.aggregator.add(state, Update(arrays=work.arrays, weight=self.examples[client], extra=end.extra))
        self.x = self.aggregator.finish(state)
        return float(self.x["w"][0])


UNEQUAL = {"a": 2, "b": 5, "c": 3}
ROUNDS = [("a", "b"), ("b", "c"), ("a", "b", "c"), ("c",)]


def test_scaffold_follows_the_papers_pseudocode() -> None:
    """Algorithm 1, option II, written out; equal examples, so that the paper's plain means are the weighted ones."""
    found = Federation("scaffold", steps=UNEQUAL, examples=dict.fromkeys(NAMES, 7), global_lr=0.8)
    x, c, own = 0.5, 0.0, dict.fromkeys(NAMES, 0.0)
    for number, names in enumerate(ROUNDS, start=1):
        moves, changes = [], []
        for i in names:
            y = x
            for _ in range(UNEQUAL[i]):
                y = y - LR * (CURVATURES[i] * (y - TARGETS[i]) - own[i] + c)
            plus = own[i] - c + (x - y) / (UNEQUAL[i] * LR)
            moves.append(y - x)
            changes.append(plus - own[i])
            own[i] = plus
        x += 0.8 * sum(moves) / len(names)
        c += sum(changes) / len(NAMES)
        assert found.round(number, names) == pytest.approx(x, abs=1e-12)
        assert float(found.aggregator.outgoing(found.x)["c/w"][0]) == pytest.approx(c, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    [("scaffold", {"a": 2, "b": 20, "c": 4}, 1e-6), ("feddyn", {"a": 40, "b": 40, "c": 40}, 1e-2)],
)
def test_unequal_clients_end_at_the_optimum_of_the_weighted_objective(
    name: str, steps: dict[str, int], tolerance: float
) -> None:
    """Where FedAvg does not: its fixed point depends on the local work."""
    examples = {"a": 10, "b": 40, "c": 50}
    weights = {i: examples[i] * CURVATURES[i] for i in NAMES}
    optimum = sum(weights[i] * TARGETS[i] for i in NAMES) / sum(weights.values())
    ends = {}
    for tried in (name, "fedavg"):
        found = Federation(tried, steps=steps, examples=examples, feddyn_alpha=1.0)
        for number in range(1, 60 if name == "feddyn" else 150):
            found.round(number, NAMES)
        ends[tried] = abs(float(found.x["w"][0]) - optimum)
    assert ends["fedavg"] > 0.05
    assert ends[name] < tolerance


def test_scaffold_counts_what_the_examples_of_a_client_become() -> None:
    """A client whose data grew replaces its old share of the control variate."""
    found = algorithm("scaffold").aggregator
    found.population = 2
    reference = {"w": np.zeros(1)}
    for before, now, sent in ((0, 4, 4 * 1.0), (4, 8, 8 * 3.0 - 4 * 1.0)):
        state = found.begin(1, reference)
        extra = {"c/w": np.array([sent]), "examples": np.array([float(before), float(now)])}
        found.add(state, Update(arrays=reference, weight=now, extra=extra))
        found.finish(state)
    assert found.outgoing(reference)["c/w"].tolist() == [3.0 / 2]  # the other client, never heard, counts as zero


@pytest.mark.parametrize(
    ("steps", "lr", "momentum", "mu", "expected"),
    [
        (5, 0.1, 0.0, 0.0, 5.0),
        (3, 0.1, 0.9, 0.0, 1 + 1.9 + 2.71),
        (4, 0.1, 0.0, 2.0, (1 - 0.8**4) / 0.2),  # section 3: [(1 - lr mu)^(t-1), ..., 1]
        (50, 0.1, 0.5, 0.0, (50 - 0.5 * (1 - 0.5**50) / 0.5) / 0.5),  # (t - r (1 - r^t) / (1 - r)) / (1 - r)
    ],
)
def test_effective_steps_are_those_of_the_paper(
    steps: int, lr: float, momentum: float, mu: float, expected: float
) -> None:
    assert effective_steps(steps, lr=lr, momentum=momentum, mu=mu) == pytest.approx(expected, rel=1e-12)


def test_effective_steps_measure_a_real_optimiser() -> None:
    """On a loss with a constant gradient of 1, momentum and a proximal term together."""
    update = algorithm("fednova", fednova_mu=0.7).client_update
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.2, momentum=0.6)
    for _ in range(7):
        w.grad = torch.ones(1, dtype=torch.float64)
        update.adjust_gradients([w], [torch.zeros(1, dtype=torch.float64)])
        optimizer.step()
    assert -float(w.detach()) / 0.2 == pytest.approx(effective_steps(7, lr=0.2, momentum=0.6, mu=0.7), rel=1e-12)


def test_fednova_is_the_papers_equation() -> None:
    examples = {"a": 10, "b": 30, "c": 60}
    found = Federation("fednova", steps=UNEQUAL, examples=examples)
    x = 0.5
    for number, names in enumerate(ROUNDS, start=1):
        total = sum(examples[i] for i in names)
        shares = {i: examples[i] / total for i in names}
        plain = ClientUpdate()
        normalised = sum(shares[i] * (descend(plain, i, x, UNEQUAL[i]) - x) / UNEQUAL[i] for i in names)
        x += sum(shares[i] * UNEQUAL[i] for i in names) * normalised
        assert found.round(number, names) == pytest.approx(x, abs=1e-12)


def test_fednova_with_equal_work_is_fedavg() -> None:
    equal, examples = dict.fromkeys(NAMES, 4), {"a": 10, "b": 30, "c": 60}
    pair = [Federation(name, steps=equal, examples=examples) for name in ("fednova", "fedavg")]
    for number, names in enumerate(ROUNDS, start=1):
        one, two = (f.round(number, names) for f in pair)
        assert one == pytest.approx(two, abs=1e-14)


def test_feddyn_follows_the_papers_pseudocode() -> None:
    alpha = 0.4
    found = Federation("feddyn", steps=UNEQUAL, examples=dict.fromkeys(NAMES, 3), feddyn_alpha=alpha)
    x, h, own = 0.5, 0.0, dict.fromkeys(NAMES, 0.0)
    for number, names in enumerate(ROUNDS, start=1):
        ends = []
        for i in names:
            y = x
            for _ in range(UNEQUAL[i]):
                y -= LR * (CURVATURES[i] * (y - TARGETS[i]) - own[i] + alpha * (y - x))
            own[i] -= alpha * (y - x)
            ends.append(y)
        h -= alpha / len(NAMES) * sum(y - x for y in ends)
        x = sum(ends) / len(ends) - h / alpha
        assert found.round(number, names) == pytest.approx(x, abs=1e-12)


def test_fedbuff_discounts_stale_changes() -> None:
    """x = 10; a fresh +2 of 3 examples, a +4 of 1 example made three models ago: 10 + 0.5 (3 * 2 + 4 / sqrt(4)) / 4."""
    found = algorithm("fedbuff", global_lr=0.5, staleness_power=0.5).aggregator
    state = found.begin(9, {"w": np.array([10.0])})
    found.add(state, Update(arrays={"w": np.array([12.0])}, weight=3.0))
    found.add(state, Update(arrays={"w": np.array([5.0])}, weight=1.0, base={"w": np.array([1.0])}, staleness=3))
    assert found.finish(state)["w"][0] == pytest.approx(10 + 0.5 * (3 * 2 + 4 / 2) / 4, abs=1e-14)


def test_fedasync_mixes_by_staleness() -> None:
    """Section 5: x = (1 - a) x + a y with a = 0.6 / (1 + 3)^0.5 = 0.3."""
    found = algorithm("fedasync", mixing=0.6, staleness_power=0.5).aggregator
    state = found.begin(9, {"w": np.array([10.0])})
    found.add(state, Update(arrays={"w": np.array([20.0])}, weight=5.0, base={"w": np.array([1.0])}, staleness=3))
    assert found.finish(state)["w"][0] == pytest.approx(0.7 * 10 + 0.3 * 20, abs=1e-14)


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_an_optimiser_that_the_algorithm_is_not_defined_for_is_refused(name: str) -> None:
    algorithm(name).client_update.check(OptimizerConfig(name="sgd"))
    with pytest.raises(InputError, match=r"not for optimizer\.name = 'adamw'"):
        algorithm(name).client_update.check(OptimizerConfig(name="adamw"))


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("fednova", {"steps": np.array(0.0)}, "steps = 0 is out of range"),
        ("fednova", {"steps": np.array(1e30)}, "out of range"),
        ("scaffold", {"c/w": np.zeros(1), "examples": np.array([-1.0, 4.0])}, "examples = -1, 4"),
        ("scaffold", {"c/w": np.zeros(1), "examples": np.array([0.0, 0.0])}, "examples = 0, 0"),
    ],
)
def test_lies_beside_the_model_are_refused(name: str, extra: Arrays, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        algorithm(name).aggregator.screen(extra, {"w": np.zeros(1)}, origin="van-1")


def test_a_servers_control_variate_that_does_not_fit_is_refused() -> None:
    start = LocalStart(parameters=("w",), reference={"w": np.zeros(3)}, extra={"c/w": np.zeros(2)})
    with pytest.raises(IntegrityError, match="server's control variate"):
        algorithm("scaffold").client_update.begin(start)


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedprox"])
def test_an_algorithm_has_no_part_in_personal_layers(name: str) -> None:
    """Neither a pull, nor a correction, nor a memory of them."""
    x = {"w": np.zeros(1), "own": np.zeros(2)}
    start = LocalStart(parameters=("w", "own"), reference=x, personal=frozenset({"own"}), extra={"c/w": np.ones(1)})
    inner = algorithm(name, feddyn_alpha=2.0, proximal_mu=2.0).client_update.begin(start)
    update = SharedOnly(inner, [True, False])
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (1, 2)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    update.adjust_gradients(parameters, [torch.zeros_like(p) for p in parameters])
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[1.0 if name == "scaffold" else 2.0], [0, 0]]
    work = LocalWork(arrays={"w": np.ones(1), "own": np.ones(2)}, num_examples=3, steps=1, lr=LR)
    end = update.finish(work)
    assert not any(key.endswith("/own") for key in {**end.state, **end.extra})
    assert name == "fedprox" or any(key.endswith("/w") for key in end.state)


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fednova"])
def test_an_interrupted_simulation_with_client_states_ends_in_the_same_bits(tmp_path: Path, name: str) -> None:
    chosen = (f"algorithm.name={name}", "algorithm.clients_per_round=2", "algorithm.personal=['head.bias']")
    app, config = small_config("toy_regression", *chosen)
    raw = app.generate(config, 0)

    def run(out: Path, stop_after: int = 0) -> str:
        def on_round(record: RoundRecord) -> None:
            if record.round == stop_after:
                raise InterruptedError

        result = simulate(app, config, raw, start=None, num_rounds=5, seed=0, out=out, on_round=on_round)
        assert all(record.applied and not record.refused for record in result.history)
        return checkpoints.load(result.final).manifest.model_sha256

    calm = run(tmp_path / "calm")
    for stop in (2, 4):
        with pytest.raises(InterruptedError):
            run(tmp_path / "again", stop)
    assert run(tmp_path / "again") == calm
