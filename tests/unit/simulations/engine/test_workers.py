"""Workers: any number of them gives the same bits; a killed one costs nothing but time."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fl_clients.training.client import ClientRuntime, Learner, Learners
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import State
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import EnvironmentFault, Interrupted
from fl_core.flower.messages import Request
from fl_core.learning.torch_arrays import get_arrays
from fl_server.engine import RoundEngine
from simulations.engine.conductor import MAX_TRIES, Conductor
from simulations.engine.grid import WorkerGrid
from simulations.engine.paths.sequential import SequentialPath
from simulations.engine.population import ExamplesPopulation
from simulations.engine.processes import ProcessWorkers
from simulations.engine.work import ClientWorker
from simulations.engine.workers import Done, InlineWorkers, Lost, StatesLost, Workers
from simulations.grid import InProcessGrid
from simulations.simulate import simulate
from tests.helpers import small_config

SETTINGS = ("data.clients=13", "data.holdout_fraction=0.0", "model.hidden=8")


class Fact(NamedTuple):
    client: int
    num_examples: int
    metrics: dict[str, float]
    refused: str


class Setup:
    def __init__(self, *overrides: str) -> None:
        self.app, self.config = small_config("toy_regression", *SETTINGS, *overrides)
        self.raw = self.app.generate(self.config, 0)
        algorithm = build_algorithm(self.config.algorithm)
        self.learner = Learner(self.app, self.config, self.app.build_model(self.config), algorithm)
        examples = self.raw.examples(self.config)
        self.population = ExamplesPopulation(examples, examples.clients())
        self.request = Request(
            application=self.app.name, config=to_table(self.config), round=1, num_rounds=2, seed=0,
            arrays=get_arrays(self.learner.model),
        )  # fmt: skip

    def make(self) -> ClientWorker:
        return partial(ClientWorker, self.learner, self.population, SequentialPath, seed=0)()

    def sums(self, workers: Workers, units_per_worker: int = 6, **options: Any) -> tuple[State, list[Any]]:
        conductor = Conductor(workers, self.population, block=2, units_per_worker=units_per_worker)
        merge = self.learner.algorithm.aggregator.merge
        state, facts = conductor.sums(self.request, range(len(self.population)), merge, **options)
        assert state is not None
        counted = [Fact(*row, "") for row in zip(facts.clients, facts.num_examples, facts.metrics, strict=True)]
        refused = [Fact(client, 0, {}, why) for client, why in facts.refused.items()]
        return state, sorted(counted + refused, key=lambda fact: fact.client)


def same(one: State, other: State) -> None:
    assert (one.weight, one.count) == (other.weight, other.count)
    assert one.sums.keys() == other.sums.keys()
    for name, value in one.sums.items():
        np.testing.assert_array_equal(value, other.sums[name], err_msg=name)


def test_any_number_of_workers_gives_the_same_bits() -> None:
    setup = Setup()
    expected, facts = setup.sums(InlineWorkers(setup.make))
    assert expected.count == 13
    for count in (2, 3):
        with ProcessWorkers(setup.make, count) as workers:
            found, found_facts = setup.sums(workers)
        same(found, expected)
        assert found_facts == facts


class Forgetful(InlineWorkers):
    """Partial states stay with these workers, and are lost the first ``times``."""

    def __init__(self, make: Any, times: int) -> None:
        super().__init__(make)
        self.left = times

    def collected(self, state: Any) -> State:
        self.left -= 1
        if self.left >= 0:
            raise StatesLost("the node is gone")
        return super().collected(state)


def test_states_lost_with_a_node_cost_a_second_try_and_nobody_counts_twice() -> None:
    setup = Setup()
    expected, facts = setup.sums(InlineWorkers(setup.make))
    found, again = setup.sums(Forgetful(setup.make, 1))
    same(found, expected)
    assert again == facts
    with pytest.raises(EnvironmentFault, match=f"nodes of the cluster were lost {MAX_TRIES} times"):
        setup.sums(Forgetful(setup.make, MAX_TRIES))


@pytest.mark.parametrize("algorithm", ["fedavg", "fedmedian", "fedadam"])
def test_partial_sums_are_the_sums_of_replies(tmp_path: Path, algorithm: str) -> None:
    """The round engine over workers against the same engine over one handler a client, one after the other."""
    setup = Setup(f"algorithm.name={algorithm}", "algorithm.clients_per_round=7")
    found = simulate(setup.app, setup.config, setup.raw, start=None, num_rounds=2, seed=3, out=tmp_path / "workers")
    learners = Learners()
    by_client = setup.raw.examples(setup.config).by_client()
    handlers = {
        name: ClientRuntime(name, lambda app, config, e=examples: e, learners=learners).handle
        for name, examples in by_client.items()
    }
    engine = RoundEngine(
        grid=InProcessGrid(handlers), application=setup.app, config=setup.config, start=None,
        initial=setup.request.arrays, num_rounds=2, seed=3, out=tmp_path / "replies", stage="simulation",
    )  # fmt: skip
    expected = checkpoints.load(engine.run())
    arrays = checkpoints.load(found.final).arrays
    for name, value in expected.arrays.items():
        np.testing.assert_allclose(arrays[name], value, rtol=0, atol=1e-6, err_msg=name)
    for one, other in zip(found.history, engine.history.records, strict=True):
        assert one.clients == other.clients
        assert one.num_examples == other.num_examples
        assert one.client_evaluation.keys() == other.client_evaluation.keys()


def test_message_by_message_gives_what_clients_give() -> None:
    """The same grid for Flower strategies: whole replies, in the order of the messages."""
    setup = Setup()
    grid = WorkerGrid(Conductor(InlineWorkers(setup.make), setup.population, block=4), lambda a, b: None)
    nodes = list(grid.get_node_ids())
    assert grid.device_names()[nodes[3]] == "client-0003"
    assert grid.knows("client-0012")
    assert not grid.knows("client-13")
    content = setup.request.to_record()
    messages = [grid.create_message(content, "train", node, "g") for node in reversed(nodes)]
    replies = grid.send_and_receive(messages, timeout=60)
    assert [r.metadata.src_node_id for r in replies] == list(reversed(nodes))
    alone = ClientRuntime("client-0012", lambda app, config: setup.population.examples(12))
    expected = alone.handle(messages[0])
    for name, array in expected.content["arrays"].items():
        np.testing.assert_array_equal(replies[0].content["arrays"][name].numpy(), array.numpy())


class Killing(ClientWorker):
    """Kills its process in the middle of a unit: once (a file notes it), or each time that it trains this client."""

    once: Path | None = None
    victim = 5

    def data(self, client: int) -> Any:
        if client == self.victim and (self.once is None or not self.once.exists()):
            if self.once is not None:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().data(client)


def killing(setup: Setup, once: Path | None) -> ClientWorker:
    worker = Killing(setup.learner, setup.population, SequentialPath, seed=0)
    worker.once = once
    return worker


def test_a_killed_workers_clients_are_done_again_exactly_once(tmp_path: Path) -> None:
    setup = Setup()
    expected, facts = setup.sums(InlineWorkers(setup.make))
    with ProcessWorkers(partial(killing, setup, tmp_path / "killed"), 2) as workers:
        found, found_facts = setup.sums(workers)
    assert (tmp_path / "killed").exists()
    same(found, expected)
    assert found_facts == facts


def test_a_client_that_kills_its_worker_each_time_is_refused() -> None:
    setup = Setup()
    with ProcessWorkers(partial(killing, setup, None), 2) as workers:
        state, facts = setup.sums(workers, units_per_worker=1)
    refused = {f.client: f.refused for f in facts if f.refused}
    assert 5 in refused
    assert f"died {MAX_TRIES} times: killed by SIGKILL" in refused[5]
    assert state.count + len(refused) == len(facts) == 13
    assert len(refused) <= 2, "no more than the leaf that it is in"


def test_workers_that_never_start_end_the_run() -> None:
    with ProcessWorkers(partial(os._exit, 7), 2) as workers:
        setup = Setup()
        with pytest.raises(EnvironmentFault, match="die again and again: ended with 7"):
            setup.sums(workers)


def test_a_stopped_simulation_ends_its_workers() -> None:
    setup, stop = Setup(), threading.Event()
    workers = ProcessWorkers(setup.make, 2)
    pids = [workers.pid(i) for i in range(2)]
    stop.set()
    with pytest.raises(Interrupted):
        setup.sums(workers, stop=stop)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_lost_and_done_are_told_apart() -> None:
    setup = Setup()
    with ProcessWorkers(setup.make, 1) as workers:
        os.kill(workers.pid(0), signal.SIGKILL)
        events: list[Done | Lost] = []
        while not events:
            events = workers.events(5)
        assert events == [Lost(0, "killed by SIGKILL")]
