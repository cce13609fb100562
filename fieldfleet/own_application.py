"""An Application made of a torch model, a loss and arrays, for notebooks and scripts; nothing of it is found by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fl_core.contracts.config import choice, number
from fl_core.contracts.errors import DataError, InputError, unknown_name
from fl_core.contracts.sections import AlgorithmConfig, ExportConfig, OptimizerConfig, PretrainConfig, SelectionConfig
from fl_core.learning.application import Application, Outputs, TensorSpec
from fl_core.learning.examples import Examples

Array = npt.NDArray[Any]
Inputs = Any  # an array (N, ...), or a mapping of names to such arrays, in the order of forward's arguments
Loss = Callable[..., Any]
Metrics = Callable[[Array, Array], Mapping[str, float]]
INPUT, OUTPUT = "inputs", "outputs"


@dataclass(frozen=True, kw_only=True)
class OwnModelConfig:
    norm: str = choice("none", "batch", "group", "none", help="of no effect: the model is built as it is given")


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig:
    holdout_fraction: float = number(0.2, low=0.0, high=0.9, help="share of clients kept out of training")
    validation_fraction: float = number(0.2, low=0.0, high=0.9, help="share of each client's examples for validation")


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """The sections of every application."""

    model: OwnModelConfig = field(default_factory=OwnModelConfig)
    data: OwnDataConfig = field(default_factory=OwnDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass(frozen=True)
class OwnData:
    """RawData over examples in memory."""

    whole: Examples

    def client_ids(self) -> tuple[str, ...]:
        return self.whole.clients()

    def select(self, clients: Collection[str]) -> Self:
        return type(self)(self.whole.of_clients(clients))

    def write(self, folder: Path) -> None:
        raise InputError("data of a notebook have no format of their own", remedy="fieldfleet apps new NAME")

    def examples(self, config: Any) -> Examples:
        return self.whole


def own_data(clients: Mapping[str, tuple[Inputs, Any]]) -> OwnData:
    """client -> (inputs, targets), arrays or tensors with the examples first. Raises DataError naming the client."""
    if not clients:
        raise DataError("no client has data", remedy="give {client: (inputs, targets)}")
    parts = {
        str(name): _checked(str(name), *pair) for name, pair in sorted(clients.items(), key=lambda item: str(item[0]))
    }
    first, (inputs, targets) = next(iter(parts.items()))
    for name, (x, y) in parts.items():
        found, expected = _shapes(x, y), _shapes(inputs, targets)
        if found != expected:
            raise DataError(f"client {name!r} has {found}, client {first!r} has {expected}")
    counts = [len(y) for _, y in parts.values()]
    owners = np.repeat(np.array(list(parts)), counts)
    ids = np.array([f"{name}/{i}" for name, count in zip(parts, counts, strict=True) for i in range(count)])
    return OwnData(
        Examples(
            {k: np.concatenate([x[k] for x, _ in parts.values()]) for k in inputs},
            np.concatenate([y for _, y in parts.values()]),
            {"example_id": ids, "client": owners, "group": ids},
        )
    )


def _checked(name: str, inputs: Inputs, targets: Any) -> tuple[dict[str, Array], Array]:
    table = {k: _array(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else {INPUT: _array(inputs)}
    y = _array(targets)
    for key, value in table.items():
        if not value.ndim or not y.ndim or len(value) != len(y):
            raise DataError(f"client {name!r}: {key} of shape {value.shape} for targets of shape {y.shape}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise DataError(f"client {name!r}: {key} holds values that are not finite")
    return table, y


def _array(value: Any) -> Array:
    """float32 for floats, int64 for integers, as torch's losses expect them."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(f"an array of {array.dtype} is not numbers")
    return array.astype({"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}[array.dtype.kind], copy=False)


def _shapes(inputs: Mapping[str, Array], targets: Array) -> str:
    each = {**inputs, "targets": targets}
    return ", ".join(f"{k} {v.dtype}{(-1, *v.shape[1:])}" for k, v in each.items())


def own_application(
    name: str, build: Callable[[], nn.Module], data: OwnData, loss: Loss | str, metrics: Metrics | None
) -> Application:
    """Raises InputError when the model does not take the data, or the loss not the model's outputs."""
    few = data.whole.take(slice(0, 2))
    sums = loss_sums(loss)
    outputs = _tried(build, few, sums)
    classes = few.targets.dtype.kind in "iub" and outputs[0].ndim > 1
    measure = metrics or (accuracy if classes else squared_error)
    names = [OUTPUT if i == 0 else f"{OUTPUT}_{i}" for i in range(len(outputs))]

    def specs(table: Mapping[str, Array]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=k, dtype=str(v.dtype), shape=(-1, *v.shape[1:])) for k, v in table.items())

    def measured(config: Any, found: Outputs, examples: Examples) -> dict[str, float]:
        return {k: float(v) for k, v in measure(np.asarray(found[OUTPUT]), examples.targets).items()}

    primary = next(iter(measure(outputs[0], few.targets)))
    return Application(
        name=name,
        title=name,
        summary="an own model",
        config_type=OwnConfig,
        data_set=name,
        client_term="client",
        read=_not_by_name,
        generate=_not_by_name,
        inputs=lambda config: specs(few.inputs),
        outputs=lambda config: specs(dict(zip(names, outputs, strict=True))),
        postprocess=lambda config, found: {"prediction": np.asarray(found[OUTPUT])},
        metrics=measured,
        groups=lambda config, examples: {},
        labels=lambda config: (),
        primary_metric=primary,
        higher_is_better=not primary.endswith(("error", "loss")),
        model=lambda config: _seeded(build),
        loss=lambda found, targets, config: sums(found, targets),
    )


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Every model of one configuration starts equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _tried(build: Callable[[], nn.Module], few: Examples, sums: Callable[..., tuple[Tensor, Tensor]]) -> list[Array]:
    try:
        model = _seeded(build).eval()
        found = model(*(torch.from_numpy(np.ascontiguousarray(v)) for v in few.inputs.values()))
        numerator, denominator = sums(found, torch.from_numpy(few.targets))
        (numerator / denominator).backward()
    except InputError:
        raise
    except Exception as error:  # the user's own code, on the first two examples
        raise InputError(
            f"the model or its loss fails on the first examples: {type(error).__name__}: {error}"
        ) from error
    return [part.detach().numpy() for part in (found if isinstance(found, tuple) else (found,))]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda found, targets: nn.functional.cross_entropy(found, targets, reduction="none"),
    "mse": lambda found, targets: (found.reshape(targets.shape) - targets) ** 2,
    "bce_with_logits": lambda found, targets: nn.functional.binary_cross_entropy_with_logits(
        found.reshape(targets.shape), targets.to(found.dtype), reduction="none"
    ),
}


def loss_sums(loss: Loss | str) -> Callable[..., tuple[Tensor, Tensor]]:
    """(sum over examples, number of examples) of a loss by name, or of loss(outputs, targets) -> (N, ...), a mean, or both sums."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise unknown_name("loss", loss, list(LOSSES))
        loss = LOSSES[loss]
    function = loss

    def sums(found: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        value = function(found, targets)
        if isinstance(value, tuple):
            return value
        count = value.new_tensor(float(value.numel() if value.ndim else len(targets)))
        return (value.sum() if value.ndim else value * count), count

    return sums


def accuracy(outputs: Array, targets: Array) -> dict[str, float]:
    return {"accuracy": float(np.mean(outputs.argmax(axis=1) == targets))}


def squared_error(outputs: Array, targets: Array) -> dict[str, float]:
    return {"mean_squared_error": float(np.mean((outputs.reshape(targets.shape) - targets) ** 2))}


def _not_by_name(*_: Any) -> Any:
    raise InputError("an application of a notebook is not found by name", remedy="fieldfleet apps new NAME")
