"""A federation on this machine: the server's round engine and the devices' local update, without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fl_clients.training.client import ClientRuntime, Learners, evaluation
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import DataError
from fl_core.contracts.sections import SelectionConfig
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples, RawData
from fl_core.learning.partition import split_clients
from fl_core.learning.torch_arrays import get_arrays, set_arrays
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from simulations.device_states import ROUND_S, SimulatedSelector, open_states
from simulations.grid import InProcessGrid


@dataclass(frozen=True)
class Simulation:
    """``final``: the folder of the last checkpoint; ``history``: one record a round; clients by name."""

    final: Path
    history: list[RoundRecord]
    clients: tuple[str, ...]
    held_out: tuple[str, ...]


def simulate(
    app: Application,
    config: Any,
    raw: RawData,
    *,
    start: Checkpoint | None,
    num_rounds: int,
    seed: int,
    out: Path,
    on_round: Callable[[RoundRecord], None] | None = None,
    device_states: str = "",
    round_s: float = ROUND_S,
) -> Simulation:
    """Federate over the clients of ``raw``; the held-out ones are only evaluated on.

    device_states: "generated" or a trace's file, for the [selection] of the configuration; a round takes ``round_s``
    seconds of their time.

    Raises DataError when no client is left to train.
    """
    torch.set_num_threads(1)
    examples = raw.examples(config)
    clients, held = split_clients(examples.clients(), config.data.holdout_fraction, seed)
    if not clients:
        raise DataError(f"{app.name}: the data set has no usable client")
    if len(clients) < config.algorithm.min_clients:
        raise DataError(
            f"{app.name}: {len(clients)} clients, {config.algorithm.min_clients} needed",
            remedy="lower algorithm.min_clients or add clients",
        )
    learners = Learners()
    by_client = examples.by_client()
    runtimes = {name: ClientRuntime(name, _own(by_client[name]), learners=learners) for name in clients}
    learner = learners.get(app.name, to_table(config))
    model = learner.model
    if start is not None:
        set_arrays(model, start.arrays, origin="the starting checkpoint")
    held_examples = examples.of_clients(held)

    def evaluate_global(arrays: Arrays) -> dict[str, float]:
        set_arrays(model, arrays, origin="global model")
        return evaluation(learner, held_examples)

    engine = RoundEngine(
        grid=InProcessGrid({name: runtime.handle for name, runtime in runtimes.items()}),
        application=app,
        config=config,
        start=start,
        initial=get_arrays(model),
        num_rounds=num_rounds,
        seed=seed,
        out=out,
        stage="simulation",
        on_round=on_round,
        evaluate_global=evaluate_global if len(held_examples) else None,
        selector=SimulatedSelector(
            getattr(config, "selection", None) or SelectionConfig(),
            open_states(device_states, {name: len(by_client[name]) for name in clients}, seed),
            seed=seed,
            application=app.name,
            round_s=round_s,
        ),
    )
    final = engine.run()
    return Simulation(final, engine.history.records, clients, held)


def _own(examples: Examples) -> Callable[[Application, Any], Examples]:
    return lambda application, config: examples
