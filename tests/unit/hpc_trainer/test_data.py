"""Packed data are the data: the same examples, the same training to the bit; damage is named; prefetching changes nothing."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import DataError, IntegrityError
from fl_core.learning import packed
from fl_core.learning.application import application
from fl_core.learning.sources import GENERATED, open_data
from fl_core.learning.windows import Windows
from hpc_trainer.prefetch import ahead
from tests.helpers import APPLICATIONS, fieldfleet, small_config

VOLUME = ("data.in_memory_mb=0", "data.reference=stored")  # lazily read on the way in, too


def examples_of(name: str, *overrides: str) -> tuple[Any, Any, Any]:
    app, config = small_config(name, *overrides)
    return app, config, open_data(app, config, GENERATED, seed=0).raw.examples(config)


def same(one: Any, other: Any) -> None:
    assert set(one.inputs) == set(other.inputs)
    for name in one.inputs:
        np.testing.assert_array_equal(np.asarray(one.inputs[name]), np.asarray(other.inputs[name]), err_msg=name)
        assert one.inputs[name].dtype == other.inputs[name].dtype
    np.testing.assert_array_equal(np.asarray(one.targets), np.asarray(other.targets))
    assert set(one.columns) == set(other.columns)
    for name in one.columns:
        np.testing.assert_array_equal(one.columns[name], other.columns[name], err_msg=name)


@pytest.mark.parametrize("name", ["toy_regression", "seismic_facies", "driver_conflict"])
def test_what_was_packed_comes_back_in_any_order(name: str, tmp_path: Path) -> None:
    app, config, examples = examples_of(name, *(VOLUME if name == "seismic_facies" else ()))
    index = packed.pack(app, config, examples, "here", tmp_path / "p", shard_bytes=500)
    assert len(index["shards"]) > 1
    found = open_data(app, config, str(tmp_path / "p"), seed=0).raw.examples(config)
    same(examples, found)
    order = np.random.default_rng(0).permutation(len(found))[:7]
    same(examples.take(order), found.take(order))
    client = found.clients()[0]
    same(examples.of_clients([client]), found.of_clients([client]))
    assert packed.check(tmp_path / "p") == index


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_application_can_be_packed(name: str, tmp_path: Path) -> None:
    app, config, examples = examples_of(name)
    packed.pack(app, config, examples, "here", tmp_path / "p", shard_bytes=1_000_000)
    same(examples, open_data(app, config, str(tmp_path / "p"), seed=0).raw.examples(config))


def test_damage_and_another_configuration_are_named(tmp_path: Path) -> None:
    app, config, examples = examples_of("toy_regression")
    folder = tmp_path / "p"
    packed.pack(app, config, examples, "here", folder, shard_bytes=300)
    with pytest.raises(DataError, match=r"packed with data\.features = \d+, asked for 7\n.*pack the data set again"):
        open_data(app, config, str(folder), seed=0).raw.examples(small_config("toy_regression", "data.features=7")[1])
    with pytest.raises(DataError, match="packed for toy_regression, not for driver_conflict"):
        open_data(application("driver_conflict"), None, str(folder), seed=0)
    victim = folder / "shard-00001" / "inputs.features.npy"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shard-00001/inputs\.features\.npy: its sha256 is another"):
        packed.check(folder)
    with pytest.raises(IntegrityError, match=r"inputs\.features\.npy: its sha256"):
        packed.stage(folder, tmp_path / "scratch")
    assert [p.name for p in (tmp_path / "scratch").iterdir() if not p.name.endswith(".lock")] == []
    victim.write_bytes(data[:-8])
    with pytest.raises(IntegrityError, match=r"inputs\.features\.npy: missing, or not of the size"):
        open_data(app, config, str(folder), seed=0)
    victim.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        packed.check(folder)
    (folder / packed.INDEX).write_text("{}")
    with pytest.raises(IntegrityError, match="not a pack of format 1"):
        packed.check(folder)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    app, config, examples = examples_of("toy_regression")
    packed.pack(app, config, examples, "here", tmp_path / "p")
    index = json.loads((tmp_path / "p" / packed.INDEX).read_text())
    index["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "p" / packed.INDEX).write_text(json.dumps(index))
    (tmp_path / "secret").write_text("x")
    with pytest.raises(IntegrityError, match=r"'\.\./secret' is not a file of this folder"):
        packed.check(tmp_path / "p")
    with pytest.raises(IntegrityError, match=r"'\.\./secret' is not a file of this folder"):
        packed.stage(tmp_path / "p", tmp_path / "scratch")


def test_many_processes_of_a_node_stage_once(tmp_path: Path) -> None:
    app, config, examples = examples_of("toy_regression")
    packed.pack(app, config, examples, "here", tmp_path / "p")
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(packed.stage(tmp_path / "p", tmp_path / "s"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    shutil.rmtree(tmp_path / "p")
    same(examples, open_data(app, config, str(found[0]), seed=0).raw.examples(config))


@pytest.mark.timeout(300)
def test_training_from_packed_data_ends_in_the_same_bits(tmp_path: Path) -> None:
    """The command itself: packed, checked, staged, read ahead by a thread."""
    settings = ["--set", "pretrain.epochs=3", "--set", "pretrain.batch_size=5", "--set", "model.hidden=8"]
    for words in (
        ("data", "pack", "toy_regression", "--data", "generated", "--out", tmp_path / "p", *settings),
        ("data", "check", tmp_path / "p"),
        ("pretrain", "toy_regression", "--data", "generated", "--out", tmp_path / "direct", *settings),
        (
            *("pretrain", "toy_regression", "--data", tmp_path / "p", "--scratch", tmp_path / "scratch"),
            *("--out", tmp_path / "packed", *settings),
        ),
    ):
        done = fieldfleet(*words)
        assert done.returncode == 0, done.stderr
    models = [checkpoints.load(tmp_path / name).manifest.model_sha256 for name in ("direct", "packed")]
    assert models[0] == models[1]
    app, config = small_config("toy_regression")
    assert isinstance(open_data(app, config, str(tmp_path / "p"), seed=0).raw.packed.inputs["features"], Windows)  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
def test_batches_made_ahead_come_in_order(depth: int) -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    found = []
    for item, ready in ahead(range(10), make, depth):
        found.append((item, ready()))
        assert len(made) <= item + 1 + depth
    assert found == [(i, i * i) for i in range(10)]
    assert made == list(range(10))


def test_an_error_ahead_is_raised_where_its_batch_is_used_and_an_early_end_leaves_no_thread() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("voxel is not finite")
        return item

    batches = ahead(range(5), make, 2)
    assert [next(batches)[1]() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="not finite"):
        next(batches)[1]()
    before = threading.active_count()
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before
