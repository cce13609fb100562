"""The Python interface: federate an own model over own data with any algorithm, on the same engine as the commands."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fieldfleet.own_application import Inputs, Loss, Metrics, own_application, own_data
from fl_core.algorithms import registered
from fl_core.algorithms.base import Algorithm
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import InputError
from fl_core.contracts.progress import Progress
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.learning.torch_arrays import set_arrays
from fl_server.history import RoundRecord
from simulations.simulate import simulate

OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Result:
    """model: the final global model, loaded; metrics: on the held-out clients; history: one record a round.

    checkpoint: its folder, None where no ``out`` was given.
    """

    model: nn.Module
    metrics: Mapping[str, float]
    history: Sequence[RoundRecord]
    clients: tuple[str, ...]
    held_out: tuple[str, ...]
    model_sha256: str
    checkpoint: Path | None


class Federation:
    """model() -> nn.Module; clients: name -> (inputs, targets), arrays or tensors with the examples first.

    inputs: one array, or a mapping of names to arrays in the order of ``forward``'s arguments. loss: "cross_entropy", "mse",
    "bce_with_logits", or loss(outputs, targets) -> one value an example, their mean, or (sum, count). metrics(outputs,
    targets) -> name -> value, numpy arrays; the first is the primary one.

    Raises DataError, InputError: clients of different shapes, a model or loss that does not take the data.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        clients: Mapping[str, tuple[Inputs, Any]],
        *,
        loss: Loss | str = "cross_entropy",
        metrics: Metrics | None = None,
        name: str = "own_model",
    ) -> None:
        self.data = own_data(clients)
        self.application = own_application(name, model, self.data, loss, metrics)

    def configure(self, settings: Mapping[str, Any] | None = None) -> Any:
        """The configuration with these ``section.key`` settings, as ``--set`` gives them. Raises ConfigError."""
        table: dict[str, Any] = {}
        for dotted, value in (settings or {}).items():
            section, _, key = dotted.partition(".")
            if not key:
                raise InputError(f"setting {dotted!r} is not section.key", remedy="for example optimizer.lr")
            table.setdefault(section, {})[key] = value
        return self.application.configure_from(table, origin="settings")

    def run(
        self,
        rounds: int,
        *,
        settings: Mapping[str, Any] | None = None,
        algorithm: str | Algorithm | Callable[[AlgorithmConfig], Algorithm] | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Result:
        """settings: as for ``configure``. algorithm: a name, an Algorithm (its two halves), or build(config) -> Algorithm.

        out: run folder; an interrupted run is taken up there. options: those of ``simulations.simulate.simulate``
        (workers, engine, ...).
        """
        if rounds < 1:
            raise InputError(f"rounds = {rounds}: at least one round is needed")
        with contextlib.ExitStack() as stack:
            given = dict(settings or {})
            if isinstance(algorithm, str):
                given["algorithm.name"] = algorithm
            elif algorithm is not None:
                stack.enter_context(registered(OWN, _build(algorithm)))
                given["algorithm.name"] = OWN
            folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="fieldfleet-")))
            bar = stack.enter_context(Progress(self.application.name, rounds, quiet=not progress))

            def shown(record: RoundRecord) -> None:
                metric = (record.held_out or record.evaluation).get(self.application.primary_metric)
                text = "" if metric is None else f"{self.application.primary_metric} {metric:.3f}"
                bar.update(record.round, text)

            config = self.configure(given)
            found = simulate(
                self.application, config, self.data,
                start=None, num_rounds=rounds, seed=seed, out=folder, on_round=shown, **options,
            )  # fmt: skip
            final = checkpoints.load(found.final)
        model = self.application.build_model(config)
        set_arrays(model, final.arrays, origin="the final model")
        return Result(
            model=model.eval(),
            metrics=final.manifest.metrics,
            history=found.history,
            clients=tuple(found.clients),
            held_out=found.held_out,
            model_sha256=final.manifest.model_sha256,
            checkpoint=found.final if out else None,
        )


def _build(algorithm: Algorithm | Callable[[AlgorithmConfig], Algorithm]) -> Callable[[AlgorithmConfig], Algorithm]:
    if isinstance(algorithm, Algorithm):
        return lambda config: copy.deepcopy(algorithm)  # each run begins with an empty memory
    return algorithm
