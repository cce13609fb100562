"""A federation on this machine: the server's round engine and the devices' local update, without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fl_clients.training.client import Learner, evaluation
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Algorithm
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.errors import DataError, InputError, IntegrityError
from fl_core.contracts.sections import SelectionConfig
from fl_core.flower.grid import StreamGrid
from fl_core.learning.application import Application
from fl_core.learning.client_states import SlotStates
from fl_core.learning.examples import Examples, RawData
from fl_core.learning.partition import split_clients
from fl_core.learning.personal import personal_names
from fl_core.learning.torch_arrays import get_arrays, set_arrays
from fl_core.optimizers import check_local
from fl_core.storage import atomic
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from fl_server.selection import Selector, UniformSelector
from fl_server.stream import check_mode
from simulations.device_states import ROUND_S, SimulatedSelector, open_states
from simulations.engine.conductor import Conductor
from simulations.engine.grid import WorkerGrid
from simulations.engine.names import AUTO
from simulations.engine.population import ExamplesPopulation, Names, Population
from simulations.engine.processes import ProcessWorkers, usable_cores
from simulations.engine.select import choose
from simulations.engine.work import ClientWorker
from simulations.engine.workers import InlineWorkers, MakeWorker, Workers
from simulations.partitioners import partitioned
from simulations.resampled import ResampledPopulation, read_spec
from simulations.virtual.fleet import Fleet, open_fleet
from simulations.virtual.grid import VirtualGrid
from simulations.virtual.setup import on_virtual_clock

PARTITION = ".partition"  # of the run folder: how the clients were made
STATES = ".clients"  # of the run folder: what algorithms keep on each client
ENGINE_NAME = ".engine.json"
SAVE_SECONDS = 1.0  # between checkpoints: what a kill costs at most, where writing would cost more than training


@dataclass(frozen=True)
class Simulation:
    """``final``: the folder of the last checkpoint; ``history``: one record a round; clients by name; ``engine``: how
    local updates were done, in words.
    """

    final: Path
    history: list[RoundRecord]
    clients: Sequence[str]
    held_out: tuple[str, ...]
    engine: str = ""


def simulate(
    app: Application,
    config: Any,
    raw: RawData | Population,
    *,
    start: Checkpoint | None,
    num_rounds: int,
    seed: int,
    out: Path,
    on_round: Callable[[RoundRecord], None] | None = None,
    device_states: str = "",
    round_s: float = ROUND_S,
    workers: int = 0,
    engine: str = AUTO,
    devices: str | Fleet = "",
    partition: str = "",
    population: str = "",
    cluster: str = "",
) -> Simulation:
    """Federate over the clients of ``raw``; the held-out ones are only evaluated on. A Population has none, and makes
    its clients' examples when they are asked for, so that memory does not grow with it.

    device_states: "generated" or a trace's file, for the [selection] of the configuration; a round takes ``round_s``
    seconds of their time. workers: processes that train, one thread each (0 = one a core, 1 = this process).
    engine: how local updates are done: "auto", or one of ``engine.select``. devices: "generated", a file or a Fleet: the
    federation runs on a virtual clock, over devices of such speeds and links ("" = all equally fast, no clock).
    population: clients that draw from the examples, as ``simulations.resampled`` says ("" = those of the data).
    partition: deals the examples out to other clients, as ``simulations.partitioners`` say ("" = those of the data).
    cluster: a Ray cluster to train on, as of ``simulations.cluster.ray_workers`` ("" = this machine).

    Raises DataError when no client is left to train, InputError for settings that do not go together; both, and what is
    wrong with ``devices`` and ``device_states``, before any worker starts.
    """
    torch.set_num_threads(1)
    everyone, held_examples, held = _opened(app, config, raw, partition, population, seed)
    clients = Names(everyone)
    algorithm = build_algorithm(config.algorithm)
    _check(app, config, algorithm, len(clients))
    learner = Learner(app, config, app.build_model(config), algorithm)
    model = learner.model
    if start is not None:
        set_arrays(model, start.arrays, origin="the starting checkpoint")
    initial = get_arrays(model)
    personal_names(initial, config.algorithm.personal)
    states = SlotStates(out.resolve() / STATES, everyone.find)
    learner = replace(learner, states=states)

    def evaluate_global(arrays: Arrays) -> dict[str, float]:
        assert held_examples is not None
        set_arrays(model, arrays, origin="global model")
        return evaluation(learner, held_examples)

    selection = getattr(config, "selection", None) or SelectionConfig()
    kept = learner.algorithm.client_update.stateful or bool(config.algorithm.personal)
    selector = _selector(selection, device_states, everyone, seed, app.name, round_s)
    fleet = open_fleet(devices, seed) if isinstance(devices, str) and devices else devices
    same_clients(out, partition or (f"population {population}" if population else ""))
    chosen = choose(engine, learner, everyone, rounds=num_rounds, seed=seed, kept=out / ENGINE_NAME)
    make = partial(ClientWorker, learner, everyone, chosen.build, seed=seed)
    shared = out.resolve() / STATES if kept else None
    with start_workers(make, workers, len(everyone), cluster, shared) as pool:
        grid: StreamGrid = WorkerGrid(Conductor(pool, everyone, block=chosen.block), learner.algorithm.aggregator.merge)
        if not isinstance(fleet, str):
            grid, selector = on_virtual_clock(
                grid, fleet, learner, everyone, initial, selection, device_states, seed=seed
            )
        rounds = RoundEngine(
            grid=grid,
            application=app,
            config=config,
            start=start,
            initial=initial,
            num_rounds=num_rounds,
            seed=seed,
            out=out,
            stage="simulation",
            on_round=on_round,
            evaluate_global=evaluate_global if held_examples else None,
            selector=selector,
            save_seconds=0.0 if kept or isinstance(grid, VirtualGrid) else SAVE_SECONDS,
        )
        if isinstance(grid, VirtualGrid):
            grid.start_at(sum(record.seconds for record in rounds.history.records))
        final = rounds.run()
    states.close()
    return Simulation(final, rounds.history.records, clients, held, chosen.shown())


def _check(app: Application, config: Any, algorithm: Algorithm, clients: int) -> None:
    """Of an algorithm with its settings, over so many clients."""
    settings = config.algorithm
    if clients < settings.min_clients:
        raise DataError(
            f"{app.name}: {clients} clients, {settings.min_clients} needed",
            remedy="lower algorithm.min_clients or add clients",
        )
    check_local(config.optimizer)
    algorithm.client_update.check(config.optimizer)
    check_mode(settings, algorithm)
    if settings.mode == "async" and settings.buffer > clients:
        raise InputError(
            f"algorithm.buffer = {settings.buffer}: a client counts once a buffer, and {clients} clients train",
            remedy=f"--set algorithm.buffer={max(1, clients // 2)}",
        )


def same_clients(out: Path, partition: str) -> None:
    """A run folder is of one partition. Raises IntegrityError for a run with another one."""
    note = out / PARTITION
    before = note.read_text(encoding="utf-8") if note.is_file() else ""
    if before != partition and any(out.glob("round-*")):
        raise IntegrityError(
            f"{out}: holds a run with the partition {before or 'of the data'!r}",
            remedy="name a new --out folder, or repeat the command that began this run",
        )
    if before != partition:
        atomic.write_bytes(note, partition.encode())


def _opened(
    app: Application, config: Any, raw: RawData | Population, partition: str, population: str, seed: int
) -> tuple[Population, Examples | None, tuple[str, ...]]:
    """(training clients, examples of the held-out ones or None, names of these)."""
    if isinstance(raw, Population):
        if partition or population or not len(raw):
            raise DataError(
                f"{app.name}: a population of {len(raw)} clients cannot be dealt out anew"
                if partition or population
                else f"{app.name}: the population is empty"
            )
        return raw, None, ()
    options = read_spec(population) if population else None
    examples = raw.examples(config)
    if partition:
        examples = partitioned(examples, partition, seed)
    clients, held = split_clients(examples.clients(), config.data.holdout_fraction, seed)
    if not clients:
        raise DataError(f"{app.name}: the data set has no usable client")
    held_examples = examples.of_clients(held)
    judged = held_examples if len(held_examples) else None
    if options is not None:
        return ResampledPopulation(examples.of_clients(clients), options, seed), judged, held
    return ExamplesPopulation(examples, clients), judged, held


def start_workers(make: MakeWorker, count: int, clients: int, cluster: str = "", shared: Path | None = None) -> Workers:
    """count, cluster: as of ``simulate``; never more than there are clients. shared: a folder that all must see."""
    if cluster:
        from simulations.cluster.ray_workers import RayWorkers

        return RayWorkers(make, cluster, count=count, limit=clients, shared=shared)
    count = min(count or usable_cores(), clients)
    return InlineWorkers(make) if count == 1 else ProcessWorkers(make, count)


def _selector(
    settings: SelectionConfig, device_states: str, population: Population, seed: int, application: str, round_s: float
) -> Selector:
    """Chance alone where nothing else is asked: the same choice, without a state for each device."""
    if settings == SelectionConfig() and not device_states:
        return UniformSelector(seed)
    examples = {population.name(i): population.size(i) for i in range(len(population))}
    source = open_states(device_states, examples, seed)
    return SimulatedSelector(settings, source, seed=seed, application=application, round_s=round_s)
