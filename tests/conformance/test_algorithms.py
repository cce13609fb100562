"""Every federated algorithm, found by name: what the round engine relies on, whatever the algorithm computes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.training.client import ClientRuntime
from fl_core.algorithms import build_algorithm, known_algorithms
from fl_core.algorithms.base import Aggregator, Update
from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.sections import AlgorithmConfig
from fl_core.flower.messages import Reply
from fl_core.learning.client_states import SlotStates
from fl_core.learning.torch_arrays import get_arrays
from fl_server.engine import RoundEngine
from simulations.grid import InProcessGrid
from tests.helpers import small_config

ALGORITHMS = known_algorithms()
Table = dict[str, np.ndarray[Any, Any]]
pytestmark = pytest.mark.parametrize("name", ALGORITHMS)


def aggregator(name: str) -> Aggregator:
    return build_algorithm(AlgorithmConfig(name=name)).aggregator


def model(seed: int, dtype: str = "float64") -> Table:
    """Parameters, a batch norm's statistics and its counter (0 dimensions)."""
    rng = np.random.default_rng(seed)
    return {
        "layer.weight": rng.normal(size=(3, 2)).astype(dtype),
        "layer.bias": rng.normal(size=3).astype(dtype),
        "norm.running_mean": rng.normal(size=3).astype(dtype),
        "norm.running_var": rng.uniform(0.5, 2, 3).astype(dtype),
        "norm.num_batches_tracked": np.array(seed, np.int64),
    }


def extra(name: str, seed: int, reference: Table) -> Table:
    """What the algorithm's clients send beside the model: positive whole numbers, different for each."""
    wanted = aggregator(name).expected(reference)
    return {k: np.full(v.shape, seed + 1, v.dtype) for k, v in wanted.items()}


def updates(name: str, count: int) -> list[Update]:
    return [Update(arrays=model(k + 1), weight=float(3 * k + 1), extra=extra(name, k, model(0))) for k in range(count)]


def one_round(found: Aggregator, sent: list[Update], reference: Table, number: int = 1) -> Table:
    state = found.begin(number, reference)
    for update in sent:
        found.add(state, update)
    return found.finish(state)


def close(found: Table, expected: Table, tolerance: float = 1e-12) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        np.testing.assert_allclose(found[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


def test_is_built_by_name_and_unknown_names_are_refused(name: str) -> None:
    assert isinstance(aggregator(name), Aggregator)
    with pytest.raises(InputError, match=name):
        build_algorithm(AlgorithmConfig(name="no-such-algorithm"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_inputs_return_themselves(name: str, dtype: str) -> None:
    found, reference = aggregator(name), model(0, dtype)
    for number in range(1, 4):
        beside = extra(name, 0, reference)
        sent = [Update(arrays=model(0, dtype), weight=w, extra=beside) for w in (1.0, 7.0, 64.0)]
        result, averaged = one_round(found, sent, reference, number), set(reference) - found.solved(reference)
        expected = {k: reference[k] for k in averaged}
        close({k: result[k] for k in averaged}, expected, 1e-12 if dtype == "float64" else 1e-7)
        assert set(result) == set(reference)


def test_order_of_clients_is_irrelevant(name: str) -> None:
    expected = one_round(aggregator(name), updates(name, 4), model(0))
    for order in itertools.permutations(updates(name, 4)):
        close(one_round(aggregator(name), list(order), model(0)), expected)


@given(cut=st.integers(0, 5), second=st.integers(0, 5))
def test_merge_equals_add(name: str, cut: int, second: int) -> None:
    sent, reference = updates(name, 5), model(0)
    low, high = sorted((cut, second))
    found = aggregator(name)
    states = [found.begin(1, reference) for _ in range(3)]
    for state, part in zip(states, (sent[:low], sent[low:high], sent[high:]), strict=True):
        for update in part:
            found.add(state, update)
    found.merge(states[0], states[1])
    found.merge(states[0], states[2])
    assert states[0].count == 5
    assert states[0].weight == sum(u.weight for u in sent)
    close(found.finish(states[0]), one_round(aggregator(name), sent, reference))


def test_merging_leaves_the_merged_state_as_it_was(name: str) -> None:
    found, reference, sent = aggregator(name), model(0), updates(name, 3)
    one, two = found.begin(1, reference), found.begin(1, reference)
    found.add(two, sent[0])
    found.merge(one, two)
    found.add(one, sent[1])
    assert two.count == 1
    close(found.finish(two), one_round(aggregator(name), sent[:1], reference))


def test_inputs_are_not_changed(name: str) -> None:
    reference, sent = model(0), updates(name, 3)
    one_round(aggregator(name), sent, reference)
    close(reference, model(0), 0)
    for update, fresh in zip(sent, updates(name, 3), strict=True):
        close(dict(update.arrays), dict(fresh.arrays), 0)


def test_no_update_leaves_the_model_bit_for_bit(name: str) -> None:
    found, reference = aggregator(name), model(0)
    result = one_round(found, [], reference)
    assert array_format.fingerprint(result) == array_format.fingerprint(reference)
    assert all(result[k] is not v for k, v in reference.items())
    close(one_round(found, updates(name, 2), reference), one_round(aggregator(name), updates(name, 2), reference))


def test_results_keep_dtypes_and_round_counters(name: str) -> None:
    beside = extra(name, 0, model(0, "float32"))
    sent = [
        Update(
            arrays={**model(1, "float32"), "norm.num_batches_tracked": np.array(n, np.int64)}, weight=1.0, extra=beside
        )
        for n in (10, 11, 11)
    ]
    result = one_round(aggregator(name), sent, model(0, "float32"))
    assert {k: v.dtype for k, v in result.items()} == {k: v.dtype for k, v in model(0, "float32").items()}
    assert result["norm.num_batches_tracked"].shape == ()
    assert result["norm.num_batches_tracked"] == 11  # mean 10.67, median 11


def test_batch_norm_statistics_are_averaged_not_stepped(name: str) -> None:
    """A server optimiser that stepped a running variance could make it negative."""
    result = one_round(aggregator(name), updates(name, 3), model(0))
    for key in ("norm.running_mean", "norm.running_var"):
        sent = np.stack([u.arrays[key] for u in updates(name, 3)])
        assert (result[key] >= sent.min(axis=0) - 1e-12).all()
        assert (result[key] <= sent.max(axis=0) + 1e-12).all()


@pytest.mark.parametrize("interrupted_after", range(5))
def test_resume_in_mid_round_equals_undisturbed(name: str, interrupted_after: int) -> None:
    """Through safetensors bytes, in the second round, so that moments are carried over too."""
    calm = aggregator(name)
    first = one_round(calm, updates(name, 2), model(0))
    expected = [one_round(calm, updates(name, 4), first, 2)]
    expected.append(one_round(calm, updates(name, 3), expected[0], 3))

    before = aggregator(name)
    one_round(before, updates(name, 2), model(0))
    state = before.begin(2, first)
    for update in updates(name, 4)[:interrupted_after]:
        before.add(state, update)
    stored = array_format.to_bytes(before.save(state))

    after = aggregator(name)
    resumed = after.load(array_format.from_bytes(stored, origin="state"), first)
    assert resumed is not None
    assert (resumed.round, resumed.count) == (2, interrupted_after)
    for update in updates(name, 4)[interrupted_after:]:
        after.add(resumed, update)
    found = [after.finish(resumed)]
    found.append(one_round(after, updates(name, 3), found[0], 3))
    assert [array_format.fingerprint(f) for f in found] == [array_format.fingerprint(e) for e in expected]


def test_what_comes_beside_the_model_is_screened(name: str) -> None:
    found, reference = aggregator(name), model(0)
    good = extra(name, 0, reference)
    found.screen(good, reference, origin="van-1")
    found.screen({}, reference, origin="van-1") if not good else None
    for key, value in good.items():
        spoilt: dict[str, Table] = {
            "missing": {k: v for k, v in good.items() if k != key},
            "unexpected": {**good, "odd": value},
            "not finite": {**good, key: np.full_like(value, np.nan)},
            r"expected float64|expected float32": {**good, key: np.zeros(99, value.dtype)},
        }
        for words, bad in spoilt.items():
            with pytest.raises(IntegrityError, match=rf"van-1: beside the model.*({words})"):
                found.screen(bad, reference, origin="van-1")


def test_memory_alone_is_saved_between_rounds(name: str) -> None:
    found = aggregator(name)
    one_round(found, updates(name, 2), model(0))
    other = aggregator(name)
    assert other.load(array_format.from_bytes(array_format.to_bytes(found.save()), origin="state"), model(0)) is None
    assert {k: v.tobytes() for k, v in other.memory.items()} == {k: v.tobytes() for k, v in found.memory.items()}


def federate(
    name: str, out: Path, *, without: tuple[str, ...] = (), poisoned: tuple[str, ...] = (), population: int = 0
) -> dict[str, Any]:
    """Two rounds over toy clients; the poisoned ones answer NaN, a wrong shape, or an error."""
    toy = "plant_disease" if name == "fedrs" else "toy_regression"  # fedrs is for classifiers
    app, config = small_config(toy, f"algorithm.name={name}", "data.clients=6")
    examples = app.generate(config, 0).examples(config)
    states = SlotStates(out / ".clients", examples.clients().index)

    def handler(client: str) -> Any:
        own = examples.of_clients([client])
        runtime = ClientRuntime(client, lambda a, c: own, states=lambda run: states)

        def answer(message: Message) -> Message:
            reply = runtime.handle(message)
            if client not in poisoned or message.metadata.message_type != "train":
                return reply
            kind = poisoned.index(client)
            if kind == 0:
                return Message(Error(1, "out of memory"), reply_to=message)
            good = Reply.from_record(reply.content, origin=client)
            first = next(iter(good.arrays))
            bad = {1: np.full_like(good.arrays[first], np.nan), 2: np.zeros(99, np.float32)}[kind]
            spoilt = Reply(num_examples=1000, metrics={}, arrays={**good.arrays, first: bad}, extra=good.extra)
            return Message(spoilt.to_record(), reply_to=message)

        return answer

    torch.set_num_threads(1)
    grid = InProcessGrid({c: handler(c) for c in examples.clients() if c not in without})
    if population:
        grid.population = lambda: population  # type: ignore[method-assign]
    engine = RoundEngine(
        grid=grid,
        application=app, config=config, start=None, initial=get_arrays(app.build_model(config)),
        num_rounds=2, seed=0, out=out, stage="simulation",
    )  # fmt: skip
    final = checkpoints.load(engine.run())
    return {"sha": final.manifest.model_sha256, "records": engine.history.records, "seen": final.manifest.clients_seen}


def test_failed_and_poisoned_replies_count_for_nothing(name: str, tmp_path: Path) -> None:
    named = ("site-0001", "site-0003", "site-0004") if name == "fedrs" else ()
    bad = named or ("client-0001", "client-0003", "client-0004")
    found = federate(name, tmp_path / "poisoned", poisoned=bad)
    expected = federate(name, tmp_path / "without", without=bad, population=6)
    assert found["sha"] == expected["sha"]
    assert found["seen"] == expected["seen"]
    assert all(set(r.refused) == set(bad) for r in found["records"])
    reasons = found["records"][0].refused
    assert "out of memory" in reasons[bad[0]]
    assert "not finite" in reasons[bad[1]]
    assert "(99,)" in reasons[bad[2]]
