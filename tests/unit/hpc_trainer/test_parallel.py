"""Each arrangement of the processes trains the one-process model: one launch of workers runs them all."""

from __future__ import annotations

import json
import shutil
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
from tests.helpers import run_python
from tests.unit.hpc_trainer.ranks import ALONE, train

TOY, LEAF, VOLUME = "toy_regression", "plant_disease", "seismic_facies"
WIDE = ("model.hidden=512", "data.features=200", "optimizer.name=adamw", "optimizer.clip_norm=0.5", "model.norm=group")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddp, batch norm": (TOY, ()),
    "ddp, ghost norm": (TOY, ("model.norm=ghost",)),
    "ddp, accumulation": (TOY, ("model.norm=group", "pretrain.micro_batch=3", "optimizer.clip_norm=0.5")),
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
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(world),
    ]
    done = run_python(
        [*(launcher if world > 1 else []), "-m", "hpc_trainer.verify_worker", *map(str, folders)],
        environment={"OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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


MESHES = ("tensor=2", "pipeline=2", "shard=2")


def resumed(mesh: str) -> dict[str, Any]:
    parallel = "fsdp" if "shard" in mesh else "ddp"
    wide = ("model.hidden=512", "data.features=200")
    changed = (f"pretrain.mesh={mesh}", f"pretrain.parallel={parallel}", "pretrain.epochs=4", "model.norm=group")
    settings = [
        *settings_of(application(TOY), []),
        *wide,
        "optimizer.name=adamw",
        "pretrain.checkpoint_every=1",
        *changed,
    ]
    return {"application": TOY, "overrides": settings, "dtype": "float64"}


@pytest.mark.timeout(300)
def test_a_checkpoint_of_each_arrangement_goes_on_in_one_process(tmp_path: Path) -> None:
    """Two processes train four epochs; one goes on from the end of their third, and ends where it ends alone."""
    files = []
    for number, mesh in enumerate(MESHES):
        files.append(tmp_path / str(number) / "spec.json")
        files[-1].parent.mkdir()
        files[-1].write_text(json.dumps(resumed(mesh)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    done = run_python(
        [*launcher, str(Path(__file__).with_name("ranks.py")), *map(str, files)],
        environment={"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = train(resumed(""), ALONE, tmp_path / "alone")
    expected = checkpoints.load(tmp_path / "alone" / "final").arrays
    for mesh, file in zip(MESHES, files, strict=True):
        out = file.parent
        for name in ("epoch-00004", "final"):
            shutil.rmtree(out / name)
        (out / "latest").unlink()
        losses = train(resumed(""), ALONE, out)
        np.testing.assert_allclose(losses, alone[-len(losses) :], rtol=1e-12, err_msg=mesh)
        found = checkpoints.load(out / "final").arrays
        for name, array in expected.items():
            np.testing.assert_allclose(
                found[name], array, rtol=0, atol=1e-12 * float(np.abs(array).max()), err_msg=name
            )
