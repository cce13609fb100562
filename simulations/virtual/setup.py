"""A simulation's parts put on a virtual clock."""

from __future__ import annotations

from functools import lru_cache

from fl_clients.training.client import Learner
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.sections import SelectionConfig
from fl_core.flower.grid import StreamGrid
from fl_core.learning.partition import client_data
from fl_core.learning.personal import personal_names
from simulations.device_states import UNKNOWN, SimulatedSelector, open_states
from simulations.engine.population import Population
from simulations.virtual.fleet import Fleet
from simulations.virtual.grid import VirtualGrid, Work


def on_virtual_clock(
    inner: StreamGrid,
    fleet: Fleet,
    learner: Learner,
    population: Population,
    initial: Arrays,
    selection: SelectionConfig,
    device_states: str,
    *,
    seed: int,
) -> tuple[VirtualGrid, SimulatedSelector]:
    """The grid, and the server's selection by what the devices report at the clock's time."""
    settings = learner.config.algorithm
    source = open_states(device_states, {population.name(i): population.size(i) for i in range(len(population))}, seed)

    @lru_cache(maxsize=65_536)
    def work(name: str) -> Work:
        fraction = learner.config.data.validation_fraction
        data = client_data(population.examples(population.find(name)), name, fraction, seed)
        return Work(
            train=len(data.train),
            validation=len(data.validation),
            epochs=settings.local_epochs,
            batch_size=settings.batch_size,
        )

    def online(name: str, time: float) -> bool:
        return not device_states or source.states(time).get(name, UNKNOWN).network != "none"

    def trained(name: str, seconds: float, time: float) -> None:
        cost = fleet.device(name).kind.battery_per_hour * seconds / 3_600
        if cost:
            source.trained([name], time, cost)

    personal = personal_names(initial, settings.personal)
    shared = {name: array for name, array in initial.items() if name not in personal}
    sent = (shared, learner.algorithm.aggregator.expected(shared))
    grid = VirtualGrid(
        inner,
        fleet,
        work=work,
        reply_bytes=sum(a.nbytes for part in sent for a in part.values()),
        deadline_s=settings.deadline_s,
        partial=settings.stragglers == "partial",
        online=online,
        on_training=trained,
    )
    selector = SimulatedSelector(selection, source, seed=seed, application=learner.application.name, clock=grid.now)
    return grid, selector
