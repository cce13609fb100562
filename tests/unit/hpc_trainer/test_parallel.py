"""Each arrangement of the processes trains the one-process model: one launch of workers runs them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.learning.application import application
from hpc_trainer.verify import RECORD, compare, settings_of
from hpc_trainer.verify_worker import train_all
from tests.forked import in_ranks
from tests.unit.hpc_trainer.ranks import ALONE, take_up, train, train_each

TOY, LEAF, VOLUME = "toy_regression", "plant_disease", "seismic_facies"
WIDE = ("model.hidden=512", "data.features=200", "optimizer.name=adamw", "optimizer.clip_norm=0.5", "model.norm=group")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddp, batch norm": (TOY, ()),
    "ddp, ghost norm": (TOY, ("model.norm=ghost",)),
    "ddp, accumulation": (TOY, ("model.norm=group", "pretrain.micro_batch=3", "optimizer.clip_norm=0.5")),
    "ddp, K-FAC of sampled targets, accumulation": (
        TOY,
        (
            # no normalisation: parameters before it have no gradient along some directions, which damping alone holds
            *("model.norm=none", "pretrain.micro_batch=3", "optimizer.name=kfac", "optimizer.fisher=sampled"),
            *("optimizer.lr=0.01", "optimizer.update_every=3", "optimizer.measure_every=2"),
        ),
    ),
    "ddp, accumulated ghost batches": (TOY, ("model.norm=ghost", "pretrain.micro_batch=8", "pretrain.batch_size=40")),
    "fsdp, clipped AdamW": (TOY, ("pretrain.parallel=fsdp", *WIDE)),
    "fsdp, accumulation": (
        TOY,
        ("pretrain.parallel=fsdp", "model.norm=group", "pretrain.micro_batch=3", "optimizer.clip_norm=0.5"),
    ),
    "fsdp, checkpointing": (LEAF, ("pretrain.parallel=fsdp", "pretrain.activation_checkpointing=true")),
    "spatial, batch norm, a volume": (VOLUME, ("pretrain.mesh=spatial=2",)),
    "spatial, clipped AdamW, accumulation, recomputation, an image": (
        LEAF,
        (
            *("pretrain.mesh=spatial=2", "model.norm=group", "pretrain.micro_batch=3", "optimizer.name=adamw"),
            *("optimizer.clip_norm=0.5", "pretrain.activation_checkpointing=true"),
        ),
    ),
    "spatial, sharded": (LEAF, ("pretrain.mesh=spatial=2", "pretrain.parallel=fsdp", "model.norm=ghost")),
    "tensor, batch norm between a pair": (VOLUME, ("pretrain.mesh=tensor=2",)),
    "tensor, clipped AdamW, accumulation, recomputation": (
        LEAF,
        (
            *("pretrain.mesh=tensor=2", "model.norm=group", "pretrain.micro_batch=3", "optimizer.name=adamw"),
            *("optimizer.clip_norm=0.5", "pretrain.activation_checkpointing=true"),
        ),
    ),
    "tensor, ghost norm": (TOY, ("pretrain.mesh=tensor=2", "model.norm=ghost", "model.hidden=17")),
    "ddp, coarse to fine": (VOLUME, ("pretrain.coarse=2:0.4",)),
    "spatial, coarse to fine, recomputation": (
        VOLUME,
        ("pretrain.mesh=spatial=2", "pretrain.coarse=2:0.4", "pretrain.activation_checkpointing=true"),
    ),
    "tensor, recomputation, a volume": (VOLUME, ("pretrain.mesh=tensor=2", "pretrain.activation_checkpointing=true")),
    "fsdp, recomputation, a volume": (
        VOLUME,
        ("pretrain.parallel=fsdp", "pretrain.activation_checkpointing=true", "model.width=32", "model.norm=group"),
    ),
    "pipeline, 1F1B": (
        VOLUME,
        ("pretrain.mesh=pipeline=2", "model.norm=group", "pretrain.schedule_of_stages=1f1b"),
    ),
    "pipeline, GPipe, clipped AdamW": (
        LEAF,
        (
            *("pretrain.mesh=pipeline=2", "model.norm=group", "pretrain.micro_batch=3", "optimizer.name=adamw"),
            *("optimizer.clip_norm=0.5", "pretrain.schedule_of_stages=gpipe"),
        ),
    ),
    "pipeline, inputs of the last stage": (
        "topology_optimisation",
        ("pretrain.mesh=pipeline=2", "model.norm=group", "data.iterations=1"),
    ),
    "hsdp": (TOY, ("pretrain.parallel=hsdp", *WIDE)),
    "pipeline of four": (VOLUME, ("pretrain.mesh=pipeline=4", "model.norm=group")),
    "pipeline of four, designs": (
        "topology_optimisation",
        ("pretrain.mesh=pipeline=4", "model.norm=group", "data.iterations=1"),
    ),
    "tensor by four": (VOLUME, ("pretrain.mesh=tensor=4", "model.norm=group")),
    "spatial by four": (VOLUME, ("pretrain.mesh=spatial=4", "model.norm=ghost")),
    "spatial by four, designs": ("topology_optimisation", ("pretrain.mesh=spatial=4", "data.iterations=1")),
}
QUICK = (
    *("ddp, accumulated ghost batches", "fsdp, accumulation"),
    *("spatial, batch norm, a volume", "spatial, sharded"),
    *("tensor, batch norm between a pair", "pipeline, GPipe, clipped AdamW"),
)
NEEDS_FOUR = (
    "hsdp",
    "pipeline of four",
    "pipeline of four, designs",
    "tensor by four",
    "spatial by four",
    "spatial by four, designs",
)


def specification(name: str, epochs: int) -> dict[str, Any]:
    app, overrides = CASES[name]
    settings = [*settings_of(application(app), []), f"pretrain.epochs={epochs}", *overrides]
    return {"application": app, "overrides": settings, "dtype": "float64", "data": "generated", "seed": 0}


def launch(names: list[str], world: int, root: Path, epochs: int) -> dict[str, Arrays]:
    folders = []
    for number, name in enumerate(names):
        folders.append(root / f"{world}-{number}")
        folders[-1].mkdir(parents=True)
        (folders[-1] / "specification.json").write_text(json.dumps(specification(name, epochs)))
    if world == 1:
        train_all(ALONE, *folders)
    else:
        in_ranks(train_all, world, *folders, timeout=500)
    return {
        n: array_format.from_bytes((f / RECORD).read_bytes(), origin=n) for n, f in zip(names, folders, strict=True)
    }


def check(names: list[str], world: int, root: Path, epochs: int = 5) -> None:
    alone, together = launch(names, 1, root, epochs), launch(names, world, root, epochs)
    found = {name: compare(alone[name], together[name], world) for name in names}
    print({name: max(c.deviations.values(), default=0) for name, c in found.items()}, file=sys.stderr)
    assert {n: (c.error, c.deviations, c.worst) for n, c in found.items() if not c.within(1e-12)} == {}


@pytest.mark.timeout(300)
def test_two_processes_in_some_arrangements(tmp_path: Path) -> None:
    check(list(QUICK), 2, tmp_path, epochs=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_in_every_arrangement(tmp_path: Path) -> None:
    check([n for n in CASES if n not in NEEDS_FOUR], 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_processes_in_every_arrangement(tmp_path: Path) -> None:
    check(list(CASES), 4, tmp_path)


SHARDED = {"shard=2": "fsdp", "replicate=2,shard=2": "hsdp", "spatial=2,shard=2": "fsdp"}
TWO = ("tensor=2", "shard=2", "pipeline=2", "data=2")
FOUR = (
    *("spatial=4", "tensor=2,data=2", "spatial=2,shard=2", "pipeline=4", "replicate=2,shard=2"),
    *("tensor=4", "data=4", "pipeline=2,data=2"),
)
WHOLE_EPOCHS, TAKEN_UP = 4, 3


def resumed(app: str, mesh: str) -> dict[str, Any]:
    small = ("model.hidden=512", "data.features=200") if app == TOY else ("pretrain.micro_batch=4",)
    changed = (f"pretrain.mesh={mesh}", f"pretrain.parallel={SHARDED.get(mesh, 'ddp')}", "model.norm=group")
    settings = [
        *settings_of(application(app), []),
        *(*small, "optimizer.name=adamw", "pretrain.average_last=0.6"),
        *("pretrain.checkpoint_every=1", f"pretrain.epochs={WHOLE_EPOCHS}", *changed),
    ]
    return {"application": app, "overrides": settings, "dtype": "float64"}


def check_taken_up(app: str, meshes: tuple[str, ...], world: int, root: Path) -> None:
    """Each arrangement trains to the end; the next one, and one process, go on from its checkpoint of the third epoch, in the middle
    of the average over the last epochs, and end where one process ends alone."""
    files, took_up = [], []
    for number, mesh in enumerate(meshes):
        first, second = root / f"{number}" / "spec.json", root / f"{number}-taken-up" / "spec.json"
        following = resumed(app, meshes[(number + 1) % len(meshes)])
        for file, spec in (
            (first, resumed(app, mesh)),
            (second, {**following, "from": str(first.parent), "at": TAKEN_UP}),
        ):
            file.parent.mkdir()
            file.write_text(json.dumps(spec))
        files += [first, second]
        took_up.append(second.parent)
    in_ranks(train_each, world, *files, timeout=500)
    alone = train(resumed(app, ""), ALONE, root / "alone")
    take_up(root / "alone", TAKEN_UP, root / "alone-taken-up")
    bits = train(resumed(app, ""), ALONE, root / "alone-taken-up")
    assert bits == alone[-len(bits) :]
    for number, mesh in enumerate(meshes):
        out, again = root / f"{number}", root / f"{number}-in-one"
        shards = [f.stat().st_size for f in (out / f"epoch-{TAKEN_UP:05d}" / "shards").iterdir()]
        assert len(shards) == world
        if "pipeline" not in mesh:  # whose stages may hold very different numbers of parameters
            assert max(shards) < 0.75 * sum(shards), "nobody writes it all"
        take_up(out, TAKEN_UP, again)
        losses = train(resumed(app, ""), ALONE, again)
        np.testing.assert_allclose(losses, alone[-len(losses) :], rtol=1e-12, err_msg=mesh)
        same_model(root / "alone", again, mesh)
        same_model(root / "alone", took_up[number], f"{mesh} -> {meshes[(number + 1) % len(meshes)]}")


def same_model(one: Path, other: Path, what: str) -> None:
    found = checkpoints.load(other / "final").arrays
    for name, array in checkpoints.load(one / "final").arrays.items():
        scale = float(np.abs(array).max())
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12 * scale, err_msg=f"{what}: {name}")


@pytest.mark.timeout(300)
def test_a_checkpoint_of_each_arrangement_goes_on_in_another_and_in_one_process(tmp_path: Path) -> None:
    check_taken_up(TOY, TWO, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_of_four_processes_goes_on_in_another_arrangement(tmp_path: Path) -> None:
    check_taken_up(VOLUME, FOUR, 4, tmp_path)
