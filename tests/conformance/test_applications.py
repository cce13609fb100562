"""Every application, found by name: a new folder joins this suite by itself (``pytest -k NAME``)."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_core.algorithms.base import ClientUpdate
from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts import config as configuration
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning import seeding
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples
from fl_core.learning.local_update import local_update
from fl_core.learning.partition import client_data, split_clients, trainable
from fl_core.learning.torch_arrays import get_arrays, predict, set_arrays, tensors
from simulations.simulate import simulate
from tests.helpers import APPLICATIONS, NORMS, same_examples, small_config

FILES = (
    *("__init__.py", "config.py", "data.py", "pipeline.py", "metrics.py", "model.py", "loss.py", "generator.py"),
    *("presets/default.toml", "README.md"),
)
pytestmark = pytest.mark.parametrize("name", APPLICATIONS)


@dataclasses.dataclass(frozen=True)
class Case:
    app: Application
    config: Any
    raw: Any
    examples: Examples


_cases: dict[str, Case] = {}


@pytest.fixture
def case(name: str) -> Case:
    """The application with small generated data; made once."""
    if name not in _cases:
        app, config = small_config(name)
        raw = app.generate(config, 0)
        _cases[name] = Case(app, config, raw, raw.examples(config))
    return _cases[name]


def package(app: Application) -> Path:
    return Path(str(importlib.import_module(app.config_type.__module__.rpartition(".")[0]).__file__)).parent


def loss_sums(case: Case, model: torch.nn.Module, examples: Examples) -> tuple[float, float]:
    """(numerator, denominator) in float64 and evaluation mode."""
    model = model.double().eval()
    inputs = (t.double() if t.is_floating_point() else t for t in tensors(case.app, case.config, examples))
    with torch.no_grad():
        found = case.app.loss_function()(model(*inputs), torch.from_numpy(examples.targets), case.config)
    return float(found[0]), float(found[1])


def test_folder_has_the_same_files_as_every_other(case: Case) -> None:
    folder = package(case.app)
    assert [f for f in FILES if not (folder / f).is_file()] == []
    assert case.app.name == folder.name


def test_presets_parse_and_survive_their_own_table(case: Case) -> None:
    for preset in case.app.presets():
        config = case.app.configure(preset=preset)
        again = case.app.configure_from(json.loads(json.dumps(configuration.to_table(config))), origin="a manifest")
        assert again == config
    assert case.app.configure().model.norm in NORMS


def test_unknown_keys_are_refused_with_file_key_and_accepted_names(case: Case) -> None:
    for section in dataclasses.fields(case.config):
        with pytest.raises(ConfigError) as refused:
            configuration.parse(case.app.config_type, {section.name: {"nonsense": 1}}, origin="some/preset.toml")
        accepted = [f.name for f in dataclasses.fields(getattr(case.config, section.name))]
        text = str(refused.value)
        assert "some/preset.toml" in text
        assert f"{section.name}.nonsense" in text
        assert all(key in text for key in accepted)
    with pytest.raises(ConfigError, match=r"--set.*nonsense"):
        case.app.configure(["nonsense.key=1"])


def test_generator_is_a_function_of_its_seed(case: Case) -> None:
    same_examples(case.app.generate(case.config, 0).examples(case.config), case.examples)
    other = case.app.generate(case.config, 1).examples(case.config)
    spec = case.app.inputs(case.config)[0].name
    a, b = other.inputs[spec], case.examples.inputs[spec]
    assert a.shape != b.shape or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def test_native_format_round_trip(case: Case, tmp_path: Path) -> None:
    case.raw.write(tmp_path / "data")
    found = case.app.read(tmp_path / "data")
    assert found.client_ids() == case.raw.client_ids()
    same_examples(found.examples(case.config), case.examples, in_order=False)


def test_select_keeps_only_those_clients_and_changes_nothing_else(case: Case) -> None:
    """A device that holds its own data alone must see what the simulator sees of it, ids and groups included."""
    clients = case.raw.client_ids()
    assert len(clients) >= 2
    for chosen in ([clients[-1]], list(clients[:2])):
        part = case.raw.select(chosen)
        assert part.client_ids() == tuple(sorted(chosen))
        same_examples(part.examples(case.config), case.examples.of_clients(chosen))


def test_examples_are_well_formed(case: Case) -> None:
    n = len(case.examples)
    assert n > 0
    assert {"example_id", "client", "group"} <= set(case.examples.columns)
    assert all(len(v) == n for v in (*case.examples.inputs.values(), *case.examples.columns.values()))
    assert len(set(case.examples.columns["example_id"].tolist())) == n
    assert set(case.examples.clients()) <= set(case.raw.client_ids())
    for spec in case.app.inputs(case.config):
        array = case.examples.inputs[spec.name]
        assert array.dtype == spec.dtype
        assert array.shape[1:] == spec.shape[1:]
        assert spec.shape[0] == -1


def test_splits_never_part_a_group_and_keep_clients_disjoint(case: Case) -> None:
    data = case.config.data
    for seed in range(5):
        training, held = split_clients(case.examples.clients(), data.holdout_fraction, seed)
        assert not set(training) & set(held)
        assert set(training) | set(held) == set(case.examples.clients())
        for client in training:
            parts = client_data(case.examples.of_clients([client]), client, max(0.3, data.validation_fraction), seed)
            groups = [set(p.columns["group"].tolist()) for p in (parts.train, parts.validation)]
            assert not groups[0] & groups[1]
            ids = [set(p.columns["example_id"].tolist()) for p in (parts.train, parts.validation)]
            assert not ids[0] & ids[1]
            assert set(trainable(case.examples.of_clients([client])).columns["example_id"].tolist()) <= ids[0] | ids[1]


@pytest.mark.parametrize("norm", NORMS)
def test_model_runs_with_every_normalisation(name: str, case: Case, norm: str) -> None:
    app, config = small_config(name, f"model.norm={norm}")
    model = app.build_model(config)
    batch = case.examples.take(slice(0, 5))
    outputs = predict(model, app, config, batch)
    specs = app.outputs(config)
    assert list(outputs) == [spec.name for spec in specs]
    for spec in specs:
        assert outputs[spec.name].dtype == spec.dtype
        assert outputs[spec.name].shape == (5, *spec.shape[1:])
        assert np.isfinite(outputs[spec.name]).all()
    model.train()
    numerator, denominator = app.loss_function()(
        model(*tensors(app, config, batch)), torch.from_numpy(batch.targets), config
    )
    assert numerator.shape == denominator.shape == ()
    (numerator / denominator).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_models_of_one_configuration_start_equal(case: Case) -> None:
    torch.manual_seed(1)
    first = get_arrays(case.app.build_model(case.config))
    torch.manual_seed(2)
    assert array_format.fingerprint(get_arrays(case.app.build_model(case.config))) == array_format.fingerprint(first)


def test_loss_adds_up_over_any_split_of_a_batch(case: Case) -> None:
    model = case.app.build_model(case.config)
    whole = np.array(loss_sums(case, model, case.examples))
    n = len(case.examples)
    for cuts in ([1], [n // 2], [n // 3, n // 3 + 1, n - 1]):
        parts = [np.array(loss_sums(case, model, case.examples.take(i))) for i in np.split(np.arange(n), cuts)]
        np.testing.assert_allclose(sum(parts), whole, rtol=1e-12)


def test_outputs_do_not_depend_on_who_else_is_in_the_batch(case: Case) -> None:
    model = case.app.build_model(case.config)
    few = case.examples.take(slice(0, 7))
    together = predict(model, case.app, case.config, few)
    alone = predict(model, case.app, case.config, few, batch_size=1)
    for key, value in together.items():
        np.testing.assert_allclose(alone[key], value, rtol=1e-4, atol=1e-5)


def test_one_local_update_lowers_the_loss(name: str, case: Case) -> None:
    app, config = small_config(name, "algorithm.local_epochs=8", "algorithm.batch_size=8")
    client = case.examples.clients()[0]
    data = client_data(case.examples.of_clients([client]), client, 0.2, 0).train
    model = app.build_model(config)
    reference = get_arrays(model)
    before = np.divide(*loss_sums(case, app.build_model(config), data))
    result = local_update(
        model, app, config, data, reference=reference, client_update=ClientUpdate(),
        client=client, round=1, num_rounds=1, seed=0,
    )  # fmt: skip
    assert result.num_examples == len(data)
    trained = app.build_model(config)
    set_arrays(trained, result.arrays, origin="local update")
    assert np.divide(*loss_sums(case, trained, data)) < before


def test_augmentation_is_keyed_by_example_and_keeps_shapes(case: Case) -> None:
    augment = case.app.augment_function()
    if augment is None:
        pytest.skip(f"{case.app.name} has no augmentation")
    batch = case.examples.take(slice(0, 12))
    keys = seeding.example_keys(7, np.arange(12))
    kept = {k: v.copy() for k, v in batch.inputs.items()}
    found = augment(batch.inputs, keys, case.config)
    order = np.random.default_rng(0).permutation(12)
    turned = augment(batch.take(order).inputs, keys[order], case.config)
    for key, value in found.items():
        assert value.shape == kept[key].shape
        assert value.dtype == kept[key].dtype
        np.testing.assert_array_equal(batch.inputs[key], kept[key], err_msg="the input was changed in place")
        np.testing.assert_array_equal(turned[key], value[order])
    single = augment(batch.take([3]).inputs, keys[[3]], case.config)
    assert all(np.array_equal(single[k][0], found[k][3], equal_nan=found[k].dtype.kind == "f") for k in found)


@pytest.mark.parametrize("norm", NORMS)
def test_checkpoint_round_trip_is_bit_equal(name: str, case: Case, norm: str, tmp_path: Path) -> None:
    app, config = small_config(name, f"model.norm={norm}")
    model = app.build_model(config).train()
    model(*tensors(app, config, case.examples.take(slice(0, 4))))  # batch norm: its statistics move
    arrays = get_arrays(model)
    manifest = CheckpointManifest(application=name, config=configuration.to_table(config), stage="pretrain")
    Checkpoint(manifest, arrays).save(tmp_path / "model")
    found = checkpoints.load(tmp_path / "model")
    assert array_format.fingerprint(found.arrays) == array_format.fingerprint(arrays)
    again = app.build_model(app.configure_from(found.manifest.config, origin="manifest"))
    set_arrays(again, found.arrays, origin="checkpoint")
    few = case.examples.take(slice(0, 6))
    for key, value in predict(model, app, config, few).items():
        np.testing.assert_array_equal(predict(again, app, config, few)[key], value)


def test_metrics_are_finite_and_named(case: Case) -> None:
    model = case.app.build_model(case.config)
    outputs = predict(model, case.app, case.config, case.examples)
    metrics = case.app.metrics(case.config, outputs, case.examples)
    assert case.app.primary_metric in metrics
    for part in (slice(None), slice(0, 1)):  # one example: an undefined metric is left out, never NaN
        found = case.app.metrics(case.config, {k: v[part] for k, v in outputs.items()}, case.examples.take(part))
        assert set(found) <= set(metrics)
        assert all(type(v) is float for v in found.values())
        json.dumps(found, allow_nan=False)
    for group, mask in case.app.groups(case.config, case.examples).items():
        assert mask.shape == (len(case.examples),), group
        assert mask.dtype == np.bool_, group
    columns = case.app.postprocess(case.config, outputs)
    assert {"score", "prediction"} & set(columns)
    assert all(len(v) == len(case.examples) for v in columns.values())
    if case.app.labels(case.config) and case.examples.targets.dtype.kind in "iu":
        assert set(np.unique(case.examples.targets)) <= set(range(len(case.app.labels(case.config))))


def test_two_simulated_rounds_work_and_repeat_bit_for_bit(name: str, case: Case, tmp_path: Path) -> None:
    app, config = small_config(name, "algorithm.clients_per_round=2", "algorithm.evaluate_every=2")
    found = [simulate(app, config, case.raw, start=None, num_rounds=2, seed=3, out=tmp_path / str(i)) for i in range(2)]
    assert [r.applied for r in found[0].history] == [True, True]
    assert not any(r.refused or r.late for r in found[0].history)
    assert found[0].held_out
    shas = [checkpoints.load(f.final).manifest.model_sha256 for f in found]
    assert shas[0] == shas[1]
    manifest = checkpoints.load(found[0].final).manifest
    assert set(manifest.clients_seen).isdisjoint(found[0].held_out)
    assert app.primary_metric in manifest.metrics or manifest.metrics
