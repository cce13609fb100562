"""Each algorithm against its paper, by hand, and FedAvg against Flower's own over the same clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fl_clients.training.client import ClientRuntime
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Aggregator, ClientUpdate, GradientTerms, Update, cast_like
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.flower.messages import Reply, Request, array_record, read_arrays
from fl_core.flower.strategy import AggregatorStrategy
from fl_core.learning.local_update import local_update
from fl_core.learning.torch_arrays import get_arrays
from fl_server.engine import RoundEngine
from simulations.grid import InProcessGrid
from tests.helpers import small_config


def step(found: Aggregator, reference: float, *sent: tuple[float, float]) -> float:
    """One round on a scalar model; ``sent``: (client's value, number of examples)."""
    state = found.begin(1, {"w": np.array([reference])})
    for value, weight in sent:
        found.add(state, Update(arrays={"w": np.array([value])}, weight=weight))
    return float(found.finish(state)["w"][0])


def test_fedavg_weighs_by_examples() -> None:
    found = build_algorithm(AlgorithmConfig(name="fedavg")).aggregator
    assert step(found, 0.0, (1.0, 10), (4.0, 30)) == pytest.approx((1 * 10 + 4 * 30) / 40, abs=1e-15)


def test_fedmedian_is_the_unweighted_middle() -> None:
    found = build_algorithm(AlgorithmConfig(name="fedmedian")).aggregator
    assert step(found, 0.0, (1.0, 1), (5.0, 1000), (2.0, 1)) == 2.0
    assert step(found, 0.0, (1.0, 1), (5.0, 9), (2.0, 1), (4.0, 1)) == 3.0
    assert step(found, 0.0, (1.0, 1), (2.0, 1), (3.0, 1), (1e30, 10**9), (-1e30, 10**9)) == 2.0


def second_moment(name: str, v: float, change: float, beta: float) -> float:
    """Reddi et al., ICLR 2021, Algorithm 2, lines for Adam and Yogi."""
    if name == "fedadam":
        return beta * v + (1 - beta) * change**2
    return v - (1 - beta) * change**2 * float(np.sign(v - change**2))


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_server_steps_follow_the_paper(name: str) -> None:
    eta, b1, b2, tau = 0.3, 0.8, 0.95, 0.05
    config = AlgorithmConfig(name=name, server_lr=eta, beta_1=b1, beta_2=b2, tau=tau)
    found = build_algorithm(config).aggregator
    x, m, v = 1.0, 0.0, tau**2
    rounds = [((1.5, 1.0), (2.0, 3.0)), ((0.0, 2.0), (1.0, 2.0)), ((1.2, 5.0), (1.3, 5.0))]
    for sent in rounds:
        mean = sum(value * weight for value, weight in sent) / sum(weight for _, weight in sent)
        change = mean - x
        m = b1 * m + (1 - b1) * change
        v = second_moment(name, v, change, b2)
        expected = x + eta * m / (v**0.5 + tau)
        x = step(found, x, *sent)
        assert x == pytest.approx(expected, abs=1e-14)


def test_first_fedadam_step_in_numbers() -> None:
    """change 1, m = 0.1, v = 0.99e-6 + 0.01: 0.1 * 0.1 / (sqrt(0.01000099) + 0.001)."""
    found = build_algorithm(AlgorithmConfig(name="fedadam", server_lr=0.1, beta_1=0.9)).aggregator
    assert step(found, 0.0, (1.0, 5.0)) == pytest.approx(0.01 / (0.01000099**0.5 + 0.001), abs=1e-15)


def test_fedprox_adds_the_gradient_of_its_proximal_term() -> None:
    update = build_algorithm(AlgorithmConfig(name="fedprox", proximal_mu=0.5)).client_update
    parameter = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    frozen = torch.nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([0.25, 0.0])
    update.adjust_gradients([parameter, frozen], [torch.tensor([1.0, 1.0]), torch.tensor([0.0])])
    assert parameter.grad.tolist() == [0.25 + 0.5 * 2.0, 0.5 * -2.0]
    assert frozen.grad is None


def test_terms_say_what_adjust_gradients_adds() -> None:
    class Corrected(ClientUpdate):
        def terms(self) -> GradientTerms:
            return GradientTerms(proximal=2.0, correction=(np.array([1.0, -1.0]), np.array([9.0])))

    parameter = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    frozen = torch.nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([0.25, 0.0])
    Corrected().adjust_gradients([parameter, frozen], [torch.tensor([1.0, 1.0]), torch.tensor([0.0])])
    assert parameter.grad.tolist() == [0.25 + 2 * 2.0 + 1.0, 2 * -2.0 - 1.0]
    assert frozen.grad is None


def test_an_algorithm_with_gradients_of_its_own_declares_no_terms() -> None:
    class Own(ClientUpdate):
        def adjust_gradients(self, parameters: Any, reference: Any) -> None:
            raise AssertionError("terms() asks only whether it is there")

    assert Own().terms() is None
    assert ClientUpdate().terms() == GradientTerms()


def test_fedprox_local_update_equals_gradient_descent_on_its_objective() -> None:
    """Plain SGD, whole-batch steps on the linear model: w <- w - lr (dL/dw + mu (w - w_global))."""
    mu, lr, epochs = 0.7, 0.05, 4
    app, config = small_config(
        "toy_regression", "algorithm.name=fedprox", f"algorithm.proximal_mu={mu}", f"optimizer.lr={lr}",
        f"algorithm.local_epochs={epochs}", "algorithm.batch_size=1000", "data.clients=1",
    )  # fmt: skip
    data = app.generate(config, 0).examples(config)
    reference = get_arrays(app.build_model(config))
    result = local_update(
        app.build_model(config), app, config, data, reference=reference,
        client_update=build_algorithm(config.algorithm).client_update, client="c", round=1, num_rounds=1, seed=0,
    )  # fmt: skip
    x, y = data.inputs["features"].astype(np.float64), data.targets.astype(np.float64)
    w0, b0 = reference["head.weight"][0].astype(np.float64), float(reference["head.bias"][0])
    w, b = w0, b0
    for _ in range(epochs):
        error = x @ w + b - y
        grad_w, grad_b = 2 * x.T @ error / len(y), 2 * error.mean()
        w, b = w - lr * (grad_w + mu * (w - w0)), b - lr * (grad_b + mu * (b - b0))
    np.testing.assert_allclose(result.arrays["head.weight"][0], w, rtol=1e-5)
    np.testing.assert_allclose(result.arrays["head.bias"][0], b, rtol=1e-5, atol=1e-6)


def test_integers_are_rounded_and_shapes_kept() -> None:
    assert cast_like(np.array(2.6), np.array(0, np.int64)).dtype == np.int64
    assert cast_like(np.array([2.6]), np.array(0, np.int64)).shape == ()
    assert cast_like(np.array([0.4, 254.7]), np.zeros(2, np.uint8)).tolist() == [0, 255]


def federation(*overrides: str) -> tuple[Any, Any, dict[str, Any]]:
    size = ("model.hidden=6", "data.examples_per_client=20", "data.clients=5")
    app, config = small_config("toy_regression", *size, *overrides)
    examples = app.generate(config, 1).examples(config)

    def own(client: str) -> Any:
        part = examples.of_clients([client]).take(slice(0, 12 + int(client[-1])))  # unequal weights
        return lambda a, c: part

    return app, config, {c: ClientRuntime(c, own(c)).handle for c in examples.clients()}


def test_fedavg_equals_flowers_own_strategy(tmp_path: Path) -> None:
    """flwr's FedAvg, unmodified, over the same grid and clients: our request is one that its strategies can send."""
    torch.set_num_threads(1)
    app, config, clients = federation()
    initial = get_arrays(app.build_model(config))
    request = Request(application=app.name, config=to_table(config), round=1, num_rounds=3, seed=0, arrays=initial)
    record = request.to_record()
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=5)
    theirs = strategy.start(
        grid=InProcessGrid(clients),
        initial_arrays=array_record(initial),
        num_rounds=3,
        train_config=record["config"],
        evaluate_config=record["config"],
    )
    record["arrays"] = theirs.arrays
    expected = read_arrays(record, "arrays", "flwr")

    engine = RoundEngine(
        grid=InProcessGrid(clients), application=app, config=config, start=None, initial=initial,
        num_rounds=3, seed=0, out=tmp_path / "run", stage="simulation",
    )  # fmt: skip
    found = checkpoints.load(engine.run()).arrays
    assert max(np.abs(found[k] - initial[k]).max() for k in found) > 0.01
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    for record_, number in zip(engine.history.records, range(1, 4), strict=True):
        assert record_.loss == pytest.approx(theirs.train_metrics_clientapp[number]["loss"], rel=1e-5)
        evaluated = theirs.evaluate_metrics_clientapp[number]
        assert record_.evaluation["r2"] == pytest.approx(evaluated["r2"], rel=1e-4)


@pytest.mark.parametrize("name", ["fedavg", "fedyogi", "fedmedian"])
def test_an_aggregator_as_a_flower_strategy_equals_the_round_engine(tmp_path: Path, name: str) -> None:
    """Flower's own ``start`` drives it, two rounds, with a client that fails and one that sends no numbers."""
    torch.set_num_threads(1)
    app, config, clients = federation(f"algorithm.name={name}")
    names = sorted(clients)

    def fails(message: Message) -> Message:
        return Message(Error(1, "out of memory"), reply_to=message)

    def poisons(message: Message) -> Message:
        found = Reply.from_record(clients[names[1]](message).content, origin="client")
        arrays = {k: np.full_like(v, np.nan) for k, v in found.arrays.items()}
        return Message(Reply(num_examples=5, metrics=found.metrics, arrays=arrays).to_record(), reply_to=message)

    handlers = {**clients, names[0]: fails, names[1]: poisons}
    initial = get_arrays(app.build_model(config))
    request = Request(application=app.name, config=to_table(config), round=1, num_rounds=2, seed=0, arrays=initial)
    told = request.to_record()["config"]
    strategy = AggregatorStrategy(build_algorithm(config.algorithm).aggregator)
    result = strategy.start(
        grid=InProcessGrid(handlers), initial_arrays=array_record(initial), num_rounds=2,
        train_config=told, evaluate_config=told,
    )  # fmt: skip
    engine = RoundEngine(
        grid=InProcessGrid(handlers), application=app, config=config, start=None, initial=initial,
        num_rounds=2, seed=0, out=tmp_path / "run", stage="simulation",
    )  # fmt: skip
    found = checkpoints.load(engine.run()).arrays
    arrays = read_arrays(RecordDict({"arrays": result.arrays}), "arrays", "flwr")
    for key, value in found.items():
        np.testing.assert_array_equal(arrays[key], value, err_msg=key)
    assert sorted(engine.history.records[0].refused) == names[:2]
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(engine.history.records[1].loss)
    with pytest.raises(InputError, match="fraction"):
        AggregatorStrategy(strategy.aggregator, fraction=0)
