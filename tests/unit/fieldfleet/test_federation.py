"""The Python interface: own models, data, losses and algorithms; the example script and the notebook."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fieldfleet import Federation, Result, register_algorithm
from fl_core.algorithms import build_algorithm, known_algorithms
from fl_core.algorithms.base import Algorithm, ClientUpdate, MeanAggregator
from fl_core.contracts.errors import ConfigError, DataError, InputError
from fl_core.contracts.sections import AlgorithmConfig
from tests.helpers import ROOT


def clients(count: int = 5, features: int = 4) -> dict[str, tuple[Any, Any]]:
    found = {}
    for i in range(count):
        rng = np.random.default_rng(i)
        x = rng.normal(size=(12 + i, features))
        found[f"site-{i}"] = (x, x.sum(1) + 1)
    return found


def line() -> nn.Module:
    return nn.Linear(4, 1)


ALL = {"data.holdout_fraction": 0.0, "data.validation_fraction": 0.0, "algorithm.batch_size": 64}


def run(federation: Federation, rounds: int = 2, **options: Any) -> Result:
    return federation.run(rounds, **{"progress": False, "workers": 1, "settings": ALL, **options})


def test_federated_averaging_of_an_own_model_equals_a_plain_loop() -> None:
    data = clients()
    found = run(Federation(line, data, loss="mse"), 3, settings={**ALL, "optimizer.lr": 0.05})
    torch.manual_seed(0)
    model = line()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    total = sum(len(y) for _, y in data.values())
    for _ in range(3):
        sums = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in state.items()}
        for x, y in data.values():
            model.load_state_dict(state)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            error = model(torch.tensor(x, dtype=torch.float32))[:, 0] - torch.tensor(y, dtype=torch.float32)
            (error**2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for k, v in model.state_dict().items():
                sums[k] += v.double() * (len(y) / total)
        state = {k: v.float() for k, v in sums.items()}
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)
    assert found.clients == tuple(data)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs[:, 0], targets)


def each_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs[:, 0], targets, reduction="none")


def sums_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    value = each_loss(outputs, targets)
    return value.sum(), value.new_tensor(float(len(value)))


@pytest.mark.parametrize("loss", [mean_loss, each_loss, sums_loss])
def test_a_loss_may_be_a_mean_one_value_an_example_or_sums(loss: Callable[..., Any]) -> None:
    expected = run(Federation(line, clients(), loss="mse")).model.state_dict()
    for name, value in run(Federation(line, clients(), loss=loss)).model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


class Halfway(MeanAggregator):
    """Goes half the way, and remembers how often."""

    def step(self, reference: Any, mean: Any) -> Any:
        self.memory["rounds"] = self.memory.get("rounds", np.zeros(())) + 1
        return {k: (reference[k] + mean[k]) / 2 for k in reference}


class Damped(ClientUpdate):
    def adjust_gradients(self, parameters: Any, reference: Any) -> None:
        for p in parameters:
            p.grad.mul_(0.5)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_own_algorithm_runs_with_any_number_of_workers_and_starts_afresh(workers: int) -> None:
    federation = Federation(line, clients(), loss="mse")
    own = Algorithm(Halfway(), Damped())
    first, second = (run(federation, algorithm=own, workers=workers) for _ in range(2))
    assert first.model_sha256 == second.model_sha256
    assert not own.aggregator.memory, "the given object stays as it is"
    plain = run(federation, workers=workers)
    built = run(federation, algorithm=lambda config: Algorithm(Halfway(), Damped()), workers=workers)
    assert built.model_sha256 == first.model_sha256 != plain.model_sha256
    assert run(federation, algorithm=own, workers=1).model_sha256 == first.model_sha256
    assert "own" not in known_algorithms()


def test_an_algorithm_is_registered_by_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_core.algorithms._registered", {})
    register_algorithm("halfway", lambda config: Algorithm(Halfway(), ClientUpdate()))
    assert isinstance(build_algorithm(AlgorithmConfig(name="halfway")).aggregator, Halfway)
    found = run(Federation(line, clients(), loss="mse"), algorithm="halfway")
    assert (
        found.model_sha256
        == run(Federation(line, clients(), loss="mse"), algorithm=Algorithm(Halfway(), ClientUpdate())).model_sha256
    )
    for taken in ("halfway", "fedavg"):
        with pytest.raises(InputError, match=f"algorithm '{taken}' exists already"):
            register_algorithm(taken, lambda config: Algorithm(Halfway(), ClientUpdate()))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, signal: Tensor, context: Tensor) -> Tensor:
        return self.left(signal) + self.right(context)


def test_several_inputs_tensors_and_own_metrics() -> None:
    def site(seed: int) -> tuple[Any, Any]:
        g = torch.Generator().manual_seed(seed)
        signal, context = torch.randn(20, 3, generator=g), torch.randn(20, 2, generator=g)
        return {"signal": signal, "context": context}, (signal[:, 0] > context[:, 0]).int()

    federation = Federation(
        Two, {i: site(i) for i in range(5)}, metrics=lambda outputs, targets: {"share_of_ones": targets.mean()}
    )
    found = run(federation, settings={"data.holdout_fraction": 0.4})
    assert set(found.metrics) == {"share_of_ones", "loss"}
    assert (len(found.clients), len(found.held_out)) == (3, 2)
    assert [r.round for r in found.history] == [1, 2]
    assert not found.model.training
    assert found.checkpoint is None


def test_a_run_folder_is_taken_up(tmp_path: Path) -> None:
    federation = Federation(line, clients(), loss="mse")
    expected = run(federation, 3)
    run(federation, 1, out=tmp_path / "run")
    (tmp_path / "run" / "final").rename(tmp_path / "elsewhere")
    found = run(federation, 3, out=tmp_path / "run")
    assert found.model_sha256 == expected.model_sha256
    assert found.checkpoint == tmp_path / "run" / "final"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"clients": {}}, DataError, "no client has data"),
        ({"clients": {"a": (np.zeros((3, 4)), np.zeros(2))}}, DataError, r"client 'a': inputs of shape \(3, 4\)"),
        ({"clients": {"a": (np.full((2, 4), np.nan), np.zeros(2))}}, DataError, "client 'a': .* not finite"),
        ({"clients": {"a": (np.array([["x"]]), np.zeros(1))}}, DataError, "not numbers"),
        ({"clients": {**clients(1), "z": (np.zeros((2, 9)), np.zeros(2))}}, DataError, "client 'z' has inputs .*9"),
        ({"loss": "absolute"}, InputError, "unknown loss 'absolute'"),
        ({"model": lambda: nn.Linear(7, 1)}, InputError, "the model or its loss fails on the first examples"),
        ({"loss": lambda o, t: o.detach().mean()}, InputError, "fails on the first examples"),
    ],
)
def test_wrong_input_is_refused_before_any_work(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"model": line, "clients": clients(), "loss": "mse", **change}
    with pytest.raises(error, match=words):
        Federation(**given)


def test_wrong_settings_are_refused() -> None:
    federation = Federation(line, clients(), loss="mse")
    with pytest.raises(ConfigError, match=r"optimizer.rate"):
        federation.configure({"optimizer.rate": 1})
    with pytest.raises(InputError, match=r"'lr' is not section\.key"):
        federation.configure({"lr": 1})
    with pytest.raises(InputError, match=r"unknown algorithm\.name 'nonsense'"):
        run(federation, algorithm="nonsense")
    with pytest.raises(InputError, match="at least one round"):
        run(federation, 0)


def test_the_example_script() -> None:
    found = runpy.run_path(str(ROOT / "examples" / "own_model.py"))["main"](2)
    assert set(found) == {"fedavg", "own"}


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order, with fewer rounds; a kernel would add nothing but weight."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((ROOT / "examples" / "own_model.ipynb").read_text(encoding="utf-8"))
    space: dict[str, Any] = {"__name__": "__main__"}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    for cell in cells:
        exec(compile(cell.replace("run(15,", "run(2,"), "own_model.ipynb", "exec"), space)
    assert set(space["results"]) == {"fedavg", "fedadam", "own"}
    assert 0 <= space["accuracy"] <= 1
