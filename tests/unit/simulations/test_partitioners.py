"""Every partitioner: each example once, whole groups, least sizes, seeded; what each is for; its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.errors import ConfigError, EnvironmentFault, InputError, IntegrityError
from fl_core.learning.examples import Examples
from simulations.partitioners import known_partitioners, partitioned, read_spec
from simulations.simulate import simulate
from tests.helpers import fieldfleet, small_config

OWN = [n for n in known_partitioners() if n not in ("natural", "flwr_datasets")]


def table(size: int, *, classes: int = 5, groups: int = 0, seed: int = 0) -> Examples:
    """Classes in unequal shares; two features, of which the first has the larger variance."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"e{i:05d}" for i in range(size)])
    group = np.array([f"g{g}" for g in rng.integers(0, groups, size)]) if groups else ids
    x = rng.normal(size=(size, 2)).astype(np.float32) * np.array([5, 1], np.float32)
    label = np.minimum(rng.geometric(0.4, size) - 1, classes - 1)
    site = np.array([f"site-{s}" for s in rng.integers(0, 3, size)]) if not groups else np.char.add("s", group)
    return Examples({"x": x}, label, {"example_id": ids, "client": np.full(size, "one"), "group": group, "site": site})


def sizes(examples: Examples) -> list[int]:
    return sorted(np.unique(examples.columns["client"], return_counts=True)[1].tolist())


def label_shares(examples: Examples) -> np.ndarray[Any, Any]:
    """(clients, labels), rows sum to 1."""
    parts = examples.by_client().values()
    counts = np.array([np.bincount(p.targets, minlength=int(examples.targets.max()) + 1) for p in parts], float)
    return counts / counts.sum(axis=1, keepdims=True)


def skew(examples: Examples) -> float:
    """Mean total variation distance between a client's labels and all labels."""
    whole = np.bincount(examples.targets) / len(examples)
    return float(np.abs(label_shares(examples) - whole).sum(axis=1).mean() / 2)


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(40, 200),
    clients=st.integers(1, 8),
    groups=st.sampled_from([0, 30]),
    least=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_every_example_once_in_whole_groups_of_at_least_the_least_size(
    name: str, size: int, clients: int, groups: int, least: int, seed: int
) -> None:
    given_ = table(size, groups=groups)
    spec = f"{name}:clients={clients},min_size={least}"
    found = partitioned(given_, spec, seed)
    assert found.columns["example_id"].tolist() == given_.columns["example_id"].tolist()
    assert found.inputs is given_.inputs
    counts = np.unique(found.columns["client"], return_counts=True)[1]
    assert len(counts) <= clients
    assert not least or (len(counts) == clients and counts.min() >= least)
    owners: dict[str, set[str]] = {}
    for group, client in zip(found.columns["group"], found.columns["client"], strict=True):
        owners.setdefault(str(group), set()).add(str(client))
    assert all(len(found_) == 1 for found_ in owners.values())
    again = partitioned(given_, spec, seed)
    assert again.columns["client"].tolist() == found.columns["client"].tolist()


def test_seeds_and_specs_make_different_partitions() -> None:
    one = partitioned(table(300), "iid", 0).columns["client"]
    assert (one != partitioned(table(300), "iid", 1).columns["client"]).any()


def test_iid_is_balanced_and_alike() -> None:
    found = partitioned(table(1000), "iid:clients=10", 0)
    assert sizes(found) == [100] * 10
    assert skew(found) < 0.1


def test_dirichlet_skews_labels_the_more_the_smaller_alpha_is() -> None:
    skews = [skew(partitioned(table(2000), f"dirichlet:clients=10,alpha={a}", 0)) for a in (0.05, 0.5, 100.0)]
    assert skews[0] > 0.4
    assert skews[0] > skews[1] > skews[2]
    assert skews[2] < 0.1


def test_shards_give_each_client_few_labels_and_equal_sizes() -> None:
    found = partitioned(table(1000, classes=10), "shards:clients=10,shards=2", 0)
    assert sizes(found) == [100] * 10
    assert max((row > 0).sum() for row in label_shares(found)) <= 8  # two runs of 50: a run may span small labels
    assert skew(found) > 0.3


def test_quantity_skews_sizes_and_not_labels() -> None:
    found = partitioned(table(3000), "quantity:clients=5,alpha=0.3,min_size=20", 0)
    assert sizes(found)[0] >= 20
    assert sizes(found)[-1] > 4 * sizes(found)[0]
    assert skew(found) < 0.25


def test_feature_shift_separates_the_input_space() -> None:
    means = {}
    for strength in (0.0, 0.5, 1.0):
        found = partitioned(table(1000), f"feature:clients=4,strength={strength}", 0)
        means[strength] = np.std([p.inputs["x"][:, 0].mean() for p in found.by_client().values()])
    assert means[0.0] < 0.5 < means[0.5] < means[1.0]


def test_natural_takes_a_column_as_it_is() -> None:
    found = partitioned(table(100), "natural:by=site", 0)
    assert found.columns["client"].tolist() == table(100).columns["site"].tolist()
    with pytest.raises(InputError, match="no column 'farm'"):
        partitioned(table(100), "natural:by=farm", 0)


def test_continuous_targets_and_masks_have_labels_too() -> None:
    rng = np.random.default_rng(0)
    plain = table(500)
    real = Examples(plain.inputs, rng.normal(size=500).astype(np.float32), plain.columns)
    found = partitioned(real, "dirichlet:clients=5,alpha=0.1,min_size=5", 0)
    centres = [p.targets.mean() for p in found.by_client().values()]
    assert np.std(centres) > 0.2
    masks = Examples(plain.inputs, np.repeat(plain.targets[:, None, None], 4, axis=1), plain.columns)
    same = partitioned(masks, "shards:clients=5", 0).columns["client"].tolist()
    assert same == partitioned(plain, "shards:clients=5", 0).columns["client"].tolist()


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("nonsense", InputError, "unknown partitioner 'nonsense'"),
        ("iid:beta=1", ConfigError, "unknown key 'beta'"),
        ("iid:clients", ConfigError, "not key=value"),
        ("dirichlet:alpha=-1", ConfigError, "alpha = -1"),
        ("iid:clients=ten", ConfigError, "clients must be an integer"),
        ("iid:clients=300", InputError, "100 examples in 100 groups do not give each of 300"),
        ("iid:clients=10,min_size=11", InputError, "do not give each of 10 clients 11"),
    ],
)
def test_wrong_specs_are_refused(spec: str, kind: type[InputError], words: str) -> None:
    with pytest.raises(kind, match=words):
        partitioned(table(100), spec, 0)


def test_flowers_partitioners_where_they_are_installed() -> None:
    read_spec("flwr_datasets:partitioner=IidPartitioner")
    spec = "flwr_datasets:partitioner=DirichletPartitioner,clients=4,settings=alpha:0.5"
    try:
        import flwr_datasets  # noqa: F401
    except ImportError:
        with pytest.raises(EnvironmentFault, match="flwr_datasets"):
            partitioned(table(200), spec, 0)
        return
    assert len(sizes(partitioned(table(400), spec, 0))) == 4


def test_a_run_folder_keeps_to_its_partition(tmp_path: Path) -> None:
    app, config = small_config("toy_regression")
    options: dict[str, Any] = {"start": None, "seed": 0, "out": tmp_path, "workers": 1}
    raw = app.generate(config, 0)
    found = simulate(app, config, raw, num_rounds=1, partition="iid:clients=3", **options)
    assert len(found.clients) + len(found.held_out) == 3
    assert found.clients[0].startswith("part-")
    with pytest.raises(IntegrityError, match="partition 'iid:clients=3'"):
        simulate(app, config, raw, num_rounds=1, partition="iid:clients=2", **options)


def test_the_command_draws_a_partition(tmp_path: Path) -> None:
    picture = tmp_path / "partition.png"
    done = fieldfleet(
        "simulate",
        "toy_regression",
        "--partition",
        "dirichlet:alpha=0.2,clients=6",
        "--plot-partition",
        picture,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)["examples"].values()) == 512
    assert picture.read_bytes().startswith(b"\x89PNG")
