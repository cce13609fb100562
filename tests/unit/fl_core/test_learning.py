"""Examples, partition, seeding, averaging, normalisation, the local update, applications by name."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fl_core.algorithms.base import ClientUpdate
from fl_core.contracts.errors import DataError, InputError, IntegrityError
from fl_core.learning import seeding, sources
from fl_core.learning.application import application
from fl_core.learning.averaging import ModelAverage
from fl_core.learning.examples import Examples, Partition
from fl_core.learning.local_update import LocalResult, batches, client_learning_rate, local_update
from fl_core.learning.normalization import norm
from fl_core.learning.partition import client_data, share, split_clients, split_groups
from fl_core.learning.torch_arrays import get_arrays, predict, set_arrays
from tests.helpers import same_examples, small_config


def examples(groups: list[str], clients: list[str] | None = None, trainable: list[bool] | None = None) -> Examples:
    n = len(groups)
    ids = np.arange(n)
    columns = {
        "example_id": np.array([f"e{i}" for i in ids], dtype=np.str_),
        "client": np.array(clients or ["c"] * n, dtype=np.str_),
        "group": np.array(groups, dtype=np.str_),
    }
    if trainable is not None:
        columns["trainable"] = np.array(trainable, bool)
    return Examples({"x": ids.astype(np.float32)}, ids.astype(np.float32), columns)


group_lists = st.lists(st.integers(0, 6).map("g{}".format), min_size=1, max_size=40)
client_lists = st.lists(st.text("abcdef0123456789-", min_size=1, max_size=6), min_size=0, max_size=20, unique=True)


@given(clients=client_lists, fraction=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_clients_are_split_once_and_for_all(clients: list[str], fraction: float, seed: int) -> None:
    training, held = split_clients(clients, fraction, seed)
    assert sorted((*training, *held)) == sorted(clients)
    assert not set(training) & set(held)
    assert split_clients(clients[::-1], fraction, seed) == (training, held)
    assert training or not clients
    if fraction > 0 and len(clients) > 1:
        assert 1 <= len(held) <= len(clients) - 1
        assert abs(len(held) - fraction * len(clients)) <= 1
    else:
        assert held == ()


@given(groups=group_lists, fraction=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_groups_never_part(groups: list[str], fraction: float, seed: int) -> None:
    data = examples(groups)
    train, validation = split_groups(data, fraction, seed)
    assert len(train) + len(validation) == len(data)
    assert not set(train.columns["group"].tolist()) & set(validation.columns["group"].tolist())
    assert len(train) > 0
    if fraction > 0 and len(set(groups)) > 1:
        largest = max(groups.count(g) for g in groups)
        assert 0 < len(validation) <= fraction * len(data) + largest
    else:
        assert len(validation) == 0


@given(groups=group_lists, seed=st.integers(0, 99), data=st.data())
def test_the_split_of_groups_does_not_depend_on_the_order_of_examples(groups: list[str], seed: int, data: Any) -> None:
    whole = examples(groups)
    order = data.draw(st.permutations(range(len(groups))))
    for one, other in zip(split_groups(whole, 0.3, seed), split_groups(whole.take(order), 0.3, seed), strict=True):
        same_examples(other, one, in_order=False)


@given(groups=group_lists, seed=st.integers(0, 9), data=st.data())
def test_what_is_not_trainable_is_scored_but_never_learned_from(groups: list[str], seed: int, data: Any) -> None:
    marks = data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))
    parts = client_data(examples(groups, trainable=marks), "c", 0.3, seed)
    plain = client_data(examples(groups), "c", 0.3, seed)
    assert parts.train.columns["trainable"].all()
    assert set(parts.validation.columns["example_id"]) == set(plain.validation.columns["example_id"])
    assert set(parts.train.columns["example_id"]) <= set(plain.train.columns["example_id"])


@given(
    clients=st.lists(st.sampled_from(["b", "a", "vehicle-10", "vehicle-9"]), min_size=1, max_size=20), data=st.data()
)
def test_examples_by_client_index_mask_and_slice(clients: list[str], data: Any) -> None:
    whole = examples(["g"] * len(clients), clients)
    parts = whole.by_client()
    assert list(parts) == list(whole.clients()) == sorted(set(clients))
    assert sum(len(p) for p in parts.values()) == len(whole)
    for name, part in parts.items():
        same_examples(part, whole.of_clients([name]))
    assert len(whole.of_clients([])) == len(whole.take([])) == len(whole.take(np.zeros(len(whole), bool))) == 0
    cut = data.draw(st.integers(0, len(whole)))
    same_examples(whole.take(slice(cut, None)), whole.take(np.arange(len(whole)) >= cut))


@given(clients=st.integers(1, 12), count=st.integers(1, 12))
def test_partitions_cover_every_client_once(clients: int, count: int) -> None:
    assume(count <= clients)
    app, config = small_config("toy_regression", f"data.clients={clients}", "data.examples_per_client=4")
    raw = app.generate(config, 0)
    found = [share(raw, Partition(id=i, count=count)).client_ids() for i in range(count)]
    assert sorted(name for part in found for name in part) == sorted(raw.client_ids())


def test_partitions_that_do_not_exist_or_are_empty() -> None:
    app, config = small_config("toy_regression")
    raw = app.generate(config, 0)
    for wrong in (-1, 3):
        with pytest.raises(InputError, match="count from 0"):
            share(raw, Partition(id=wrong, count=3))
    with pytest.raises(DataError, match="has 4 clients"):
        share(raw, Partition(id=4, count=5))


@given(
    a=st.lists(st.integers() | st.text(max_size=5), max_size=4),
    b=st.lists(st.integers() | st.text(max_size=5), max_size=4),
)
def test_keys_tell_their_parts_apart(a: list[Any], b: list[Any]) -> None:
    assert 0 <= seeding.key(*a) < 2**63
    assert (seeding.key(*a) == seeding.key(*b)) == (a == b)


def test_keys_are_the_same_on_every_machine() -> None:
    """Recorded once: a change of these values changes every run that is to be repeated."""
    assert seeding.key(0, "order", 1, "client-0001") == 3580431710026855206
    assert seeding.generator(7, "x").permutation(5).tolist() == [2, 3, 0, 1, 4]


@given(base=st.integers(0, 2**63 - 1), index=st.lists(st.integers(0, 10**6), min_size=2, max_size=50, unique=True))
def test_example_keys_are_distinct_and_independent_of_position(base: int, index: list[int]) -> None:
    keys = seeding.example_keys(base, np.array(index))
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist())) == len(index)
    assert seeding.example_keys(base, np.array(index[::-1])).tolist() == keys.tolist()[::-1]


@given(count=st.integers(0, 50), size=st.integers(1, 60))
def test_batches_hold_each_example_once(count: int, size: int) -> None:
    found = batches(count, size, 1, "order")
    assert sorted(np.concatenate([*found, np.zeros(0, int)]).tolist()) == list(range(count))
    assert all(len(b) == size for b in found[:-1])
    assert all(len(b) > 0 for b in found)


@given(fraction=st.floats(0, 1), steps=st.integers(1, 12), cut=st.integers(0, 12))
def test_average_is_of_the_last_models_and_resumes(fraction: float, steps: int, cut: int) -> None:
    models = [{"w": np.array([k], np.float32), "n": np.array(k)} for k in range(1, steps + 1)]
    one, two = ModelAverage(fraction, steps), ModelAverage(fraction, steps)
    for step, model in enumerate(models, 1):
        one.add(step, model)
        if step == cut:
            stored, two = two.save(), ModelAverage(fraction, steps)
            two.load(stored)
        two.add(step, model)
    last = math.ceil(fraction * steps) or 1
    expected = np.mean([float(m["w"][0]) for m in models[-last:]])
    for found in (one.result(models[-1]), two.result(models[-1])):
        assert found["w"][0] == pytest.approx(expected, rel=1e-6)
        assert found["w"].dtype == np.float32
        assert found["n"] == np.rint(expected)
        assert found["n"].shape == ()


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 12, 30, 64])
def test_group_norm_never_wipes_out_its_values(channels: int) -> None:
    layer = norm("group", channels, dims=1)
    x = torch.randn(4, channels, generator=torch.Generator().manual_seed(0))
    assert channels == 1 or float(layer(x).detach().abs().max()) > 0.1


def test_normalisations_by_name() -> None:
    assert isinstance(norm("none", 4, dims=2), torch.nn.Identity)
    assert [type(norm("batch", 4, dims=d)).__name__ for d in (1, 2, 3)] == ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
    with pytest.raises(InputError, match="batch, ghost, group, none"):
        norm("layer", 4, dims=1)


def test_cosine_learning_rate_over_rounds() -> None:
    _, config = small_config("toy_regression", "algorithm.schedule=cosine", "algorithm.client_lr=0.2")
    rates = [client_learning_rate(config, r, 10) for r in range(1, 11)]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.1)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))
    _, config = small_config("toy_regression", "optimizer.lr=0.3")
    assert client_learning_rate(config, 7, 10) == 0.3


def update(name: str, *overrides: str, model: Any = None, count: int = 10, **keys: Any) -> LocalResult:
    app, config = small_config(name, *overrides)
    data = app.generate(config, 0).examples(config).take(slice(0, count))
    model = model or app.build_model(config)
    arguments = {"client": "c", "round": 1, "num_rounds": 2, "seed": 0, **keys}
    return local_update(
        model,
        app,
        config,
        data,
        reference=get_arrays(app.build_model(config)),
        client_update=ClientUpdate(),
        **arguments,
    )


def test_local_update_depends_on_seed_round_and_client_alone() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    first = update("toy_regression", "algorithm.batch_size=3")
    torch.manual_seed(6)
    torch.randn(3)
    app, config = small_config("toy_regression")
    used = app.build_model(config)
    with torch.no_grad():
        for p in used.parameters():
            p.add_(1.0)  # what the model held before does not matter
    again = update("toy_regression", "algorithm.batch_size=3", model=used)
    for key, value in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], value)
    for keys in ({"seed": 1}, {"round": 2}, {"client": "d"}):
        other = update("toy_regression", "algorithm.batch_size=3", **keys)
        assert any(not np.array_equal(other.arrays[k], v) for k, v in first.arrays.items()), keys


def test_local_update_on_nothing_returns_the_global_model() -> None:
    found = update("toy_regression", count=0)
    assert (found.num_examples, found.loss) == (0, 0.0)
    app, config = small_config("toy_regression")
    for key, value in get_arrays(app.build_model(config)).items():
        np.testing.assert_array_equal(found.arrays[key], value)


def test_clipping_bounds_the_step() -> None:
    app, config = small_config("toy_regression")
    start = get_arrays(app.build_model(config))
    found = update("toy_regression", "optimizer.clip_norm=0.001", "optimizer.lr=1.0", "algorithm.batch_size=100")
    change = math.sqrt(sum(float(((found.arrays[k] - v) ** 2).sum()) for k, v in start.items()))
    assert change == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("count", [1, 9])
def test_batch_norm_survives_a_last_batch_of_one(count: int) -> None:
    """8 + 1 examples: a batch of one has no variance, but a device with such a number of examples must take part."""
    found = update("toy_regression", "model.norm=batch", "model.hidden=4", "algorithm.batch_size=8", count=count)
    assert found.num_examples == count
    assert all(np.isfinite(a).all() for a in found.arrays.values() if a.dtype.kind == "f")


def test_set_arrays_names_what_does_not_fit_and_changes_nothing() -> None:
    app, config = small_config("toy_regression")
    model = app.build_model(config)
    before = get_arrays(model)
    with pytest.raises(IntegrityError, match=r"from afar: array 'head\.bias'"):
        set_arrays(
            model, {**before, "head.weight": before["head.weight"] + 1, "head.bias": np.zeros(3)}, origin="from afar"
        )
    for key, value in get_arrays(model).items():
        np.testing.assert_array_equal(value, before[key])


def test_predict_keeps_the_mode_and_handles_no_examples() -> None:
    app, config = small_config("toy_regression")
    model = app.build_model(config).train()
    data = app.generate(config, 0).examples(config)
    assert predict(model, app, config, data, batch_size=5)["value"].shape == (len(data),)
    assert model.training
    assert predict(model, app, config, data.take([]))["value"].shape == (0,)


def test_data_option_environment_and_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, config = small_config("toy_regression")
    monkeypatch.delenv("FIELDFLEET_DATA", raising=False)
    assert sources.open_data(app, config, None, seed=0).path is None
    with pytest.raises(DataError, match="no such folder"):
        sources.open_data(app, config, str(tmp_path / "absent"), seed=0)
    app.generate(config, 3).write(tmp_path / "sets" / app.data_set)
    monkeypatch.setenv("FIELDFLEET_DATA", str(tmp_path / "sets"))
    found = sources.open_data(app, config, None, seed=0)
    assert found.path == tmp_path / "sets" / app.data_set
    same_examples(found.raw.examples(config), app.generate(config, 3).examples(config))
    assert sources.open_data(app, config, "generated", seed=0).path is None
    monkeypatch.setenv("FIELDFLEET_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="FIELDFLEET_DATA"):
        sources.open_data(app, config, None, seed=0)


def test_unknown_applications_and_presets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown application 'toy'.*\n.*toy_regression"):
        application("toy")
    with pytest.raises(InputError, match=r"unknown preset of toy_regression 'x'.*\n.*default"):
        application("toy_regression").configure(preset="x")
    with pytest.raises(InputError, match=r"unknown application '\.\./x'"):
        application("../x")


def test_toy_regression_names_what_is_wrong_in_its_file(tmp_path: Path) -> None:
    app, config = small_config("toy_regression")
    file = tmp_path / "rows.csv"
    for content, words in (
        ("client,x0\na,1\n", r"rows\.csv: column 'target'"),
        ("client,target,x0\na,1,two\n", r"rows\.csv: could not convert.*two"),
        ("client,target,x0\na,1,nan\n", r"rows\.csv: holds values that are not finite"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=words):
            app.read(tmp_path)
    file.write_text("client,target,x0\na,1,2\n")
    with pytest.raises(DataError, match=r"data\.features=1"):
        app.read(tmp_path).examples(dataclasses.replace(config))
